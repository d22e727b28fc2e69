// What cuda_w4a16.cu takes from CUDA, for a host compiler: every GPU thread is a fiber, and thread blocks run one by one.
//
// Operations of a whole warp (mma, ldmatrix) exchange operands through memory and compute each lane's part by the fragment
// tables of the PTX ISA, sections "Matrix Fragments for mma.m16n8k16" and "ldmatrix". Asynchronous copies land either at once
// or as late as their wait allows, so that both reading too early and overwriting too early show.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <vector>

#define DEVICE inline

struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };

namespace emulation {
constexpr int THREADS = 256, STACK = 1 << 16;
struct Copy { char* to; const char* from; int bytes; };
struct Range { const char* begin; long long bytes; };
struct Barrier { int phase = 0, expected = 0; bool arrived = false; std::deque<Copy> copies; };
struct Warp { unsigned generation = 0, waiting = 0; unsigned operands[32][10]; const char* rows[32]; };
struct Fiber { ucontext_t start; jmp_buf state; std::vector<char> stack = std::vector<char>(STACK); bool started, done; };

inline Fiber fibers[THREADS];
inline Warp warps[THREADS / 32], whole;                   // `whole` counts the threads of a block
inline std::vector<std::vector<Copy>> groups[THREADS];    // committed cp.async copies, oldest first
inline std::vector<Copy> open_group[THREADS];
inline std::vector<char> memory;
inline std::vector<Barrier> barriers;
inline std::vector<Range> readable;                       // global memory that copies may read
inline jmp_buf scheduler;
inline int thread, block, blocks;
inline bool late, broken;
inline std::function<void()> body;

inline void yield() {
  if (_setjmp(fibers[thread].state) == 0) _longjmp(scheduler, 1);
}
inline void entry() {
  body();
  fibers[thread].done = true;
  _longjmp(scheduler, 1);
}
inline void meet(Warp& w, unsigned threads) {
  const unsigned generation = w.generation;
  if (++w.waiting == threads) w.waiting = 0, ++w.generation;
  else while (w.generation == generation) yield();
}
inline Warp& my_warp() { return warps[thread / 32]; }
inline void run(const Copy& c) { memcpy(c.to, c.from, c.bytes); }
inline void check(const Copy& c) {
  bool inside = false;
  for (const Range& r : readable) inside |= r.begin && c.from >= r.begin && c.from + c.bytes <= r.begin + r.bytes;
  broken |= !inside || c.to < memory.data() || c.to + c.bytes > memory.data() + memory.size();
  broken |= ((uintptr_t)c.to | (uintptr_t)c.from | c.bytes) % 16 != 0;
}

// False when the threads wait for each other forever or break a rule. The order of threads and blocks must not matter:
// `backwards` turns both around.
inline bool launch(int grid, int shared, bool copies_late, bool backwards, std::function<void()> kernel) {
  late = copies_late, blocks = grid, body = kernel, broken = false;
  for (int b = 0; b < grid; ++b) {
    block = backwards ? grid - 1 - b : b;
    memory.assign(shared + 128, (char)0xFF);  // NaN in every type
    barriers.clear();
    for (auto& w : warps) w = Warp();
    whole = Warp();
    for (int t = 0; t < THREADS; ++t) {
      Fiber& f = fibers[t];
      groups[t].clear(), open_group[t].clear();
      getcontext(&f.start);
      f.start.uc_stack.ss_sp = f.stack.data(), f.start.uc_stack.ss_size = STACK, f.start.uc_link = nullptr;
      makecontext(&f.start, entry, 0);
      f.started = f.done = false;
    }
    volatile int left = THREADS;
    for (volatile long round = 0; left; round = round + 1) {
      if (round > 1000000) return false;
      left = 0;
      for (volatile int t = 0; t < THREADS; t = t + 1) {
        thread = backwards ? THREADS - 1 - t : t;
        if (fibers[thread].done) continue;
        left = left + 1;
        if (_setjmp(scheduler) == 0) {
          if (fibers[thread].started) _longjmp(fibers[thread].state, 1);
          fibers[thread].started = true;
          setcontext(&fibers[thread].start);
        }
      }
    }
  }
  return !broken;
}
inline float half_to_float(unsigned short h) {
  _Float16 v;
  memcpy(&v, &h, 2);
  return (float)v;
}
template <bool BF16> float value(unsigned word, int half) {
  const unsigned short h = word >> 16 * half & 0xFFFF;
  if (!BF16) return half_to_float(h);
  const unsigned bits = (unsigned)h << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
template <bool BF16> unsigned short round_to(double v) {
  if (!BF16) {
    const _Float16 h = (_Float16)v;
    unsigned short bits;
    memcpy(&bits, &h, 2);
    return bits;
  }
  const float f = (float)v;
  unsigned bits;
  memcpy(&bits, &f, 4);
  if (std::isnan(f)) return 0x7FC0;
  return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}
}  // namespace emulation

DEVICE int thread_index() { return emulation::thread; }
DEVICE int block_index() { return emulation::block; }
DEVICE int grid_size() { return emulation::blocks; }
DEVICE void sync_threads() { emulation::meet(emulation::whole, emulation::THREADS); }
DEVICE char* shared_memory() { return (char*)(((uintptr_t)emulation::memory.data() + 127) / 128 * 128); }

DEVICE void copy_16(char* to, const char* from) {
  emulation::check({to, from, 16});
  if (emulation::late) emulation::open_group[emulation::thread].push_back({to, from, 16});
  else emulation::run({to, from, 16});
}
DEVICE void commit_copies() {
  emulation::groups[emulation::thread].push_back(emulation::open_group[emulation::thread]);
  emulation::open_group[emulation::thread].clear();
}
template <int PENDING> DEVICE void wait_copies() {
  auto& groups = emulation::groups[emulation::thread];
  while ((int)groups.size() > PENDING) {
    for (auto& c : groups.front()) emulation::run(c);
    groups.erase(groups.begin());
  }
}

// A barrier's word in shared memory holds its number.
DEVICE void barrier_init(unsigned long long* b) {
  *b = emulation::barriers.size();
  emulation::barriers.emplace_back();
}
DEVICE void barrier_fence() {}
DEVICE void barrier_expect(unsigned long long* b, int bytes) {
  emulation::Barrier& barrier = emulation::barriers[*b];
  if (barrier.arrived) emulation::broken = true;
  barrier.arrived = true, barrier.expected += bytes;
}
DEVICE void barrier_settle(emulation::Barrier& b) {
  if (b.arrived && b.expected == 0) b.arrived = false, ++b.phase;
}
DEVICE void copy_bulk(char* to, const char* from, int bytes, unsigned long long* b) {
  emulation::check({to, from, bytes});
  emulation::Barrier& barrier = emulation::barriers[*b];
  if (emulation::late) return barrier.copies.push_back({to, from, bytes});
  emulation::run({to, from, bytes});
  barrier.expected -= bytes;
  barrier_settle(barrier);
}
DEVICE void barrier_wait(unsigned long long* b, int parity) {
  emulation::Barrier& barrier = emulation::barriers[*b];
  while (barrier.phase % 2 == parity) {
    if (!barrier.copies.empty()) {
      emulation::run(barrier.copies.front());
      barrier.expected -= barrier.copies.front().bytes;
      barrier.copies.pop_front();
      barrier_settle(barrier);
    } else emulation::yield();
  }
}
DEVICE void wait_for_previous_kernel() {}
DEVICE void let_next_kernel_start() {}

DEVICE unsigned permute_bytes(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = (uint64_t)b << 32 | a;
  unsigned d = 0;
  for (int i = 0; i < 4; ++i) d |= (unsigned)(bytes >> 8 * (selector >> 4 * i & 7) & 0xFF) << 8 * i;
  return d;
}
template <bool BF16> DEVICE unsigned fma2(unsigned a, unsigned b, unsigned c) {
  unsigned d = 0;
  for (int h = 0; h < 2; ++h)
    d |= (unsigned)emulation::round_to<BF16>((double)emulation::value<BF16>(a, h) * emulation::value<BF16>(b, h) +
                                             emulation::value<BF16>(c, h)) << 16 * h;
  return d;
}
template <bool BF16> DEVICE float to_float(unsigned short h) { return emulation::value<BF16>(h, 0); }
template <bool BF16> DEVICE unsigned short from_float(float f) { return emulation::round_to<BF16>(f); }

DEVICE void load_matrices(const char* row, unsigned& a, unsigned& b, unsigned& c, unsigned& d) {
  emulation::Warp& w = emulation::my_warp();
  const int lane = emulation::thread % 32;
  unsigned* const to[4] = {&a, &b, &c, &d};
  if ((uintptr_t)row % 16) emulation::broken = true;
  w.rows[lane] = row;
  emulation::meet(w, 32);
  for (int i = 0; i < 4; ++i) memcpy(to[i], w.rows[8 * i + lane / 4] + lane % 4 * 4, 4);
  emulation::meet(w, 32);
}
template <bool BF16> DEVICE void multiply(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  emulation::Warp& w = emulation::my_warp();
  const int lane = emulation::thread % 32;
  memcpy(w.operands[lane], a, 16), memcpy(w.operands[lane] + 4, b, 8);
  emulation::meet(w, 32);
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + (i < 2 ? 0 : 8), column = lane % 4 * 2 + (i & 1);
    for (int k = 0; k < 16; ++k) {
      // A: row = groupID (+ 8 for a2, a3, a6, a7), column = 2 threadID_in_group + (i & 1) (+ 8 from a4 on).
      const int a_element = (k & 1) + (row >= 8 ? 2 : 0) + (k >= 8 ? 4 : 0), a_lane = row % 8 * 4 + k % 8 / 2;
      // B: row = 2 threadID_in_group + (i & 1) (+ 8 for b2, b3), column = groupID.
      const int b_element = (k & 1) + (k >= 8 ? 2 : 0), b_lane = column * 4 + k % 8 / 2;
      d[i] += emulation::value<BF16>(w.operands[a_lane][a_element / 2], a_element % 2) *
              emulation::value<BF16>(w.operands[b_lane][4 + b_element / 2], b_element % 2);
    }
  }
  emulation::meet(w, 32);
}
DEVICE unsigned arrive(unsigned* counter) { return (*counter)++; }
DEVICE float load_from_l2(const float* p) { return *p; }
