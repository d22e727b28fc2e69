"""llama.cpp's CPU product with Q4_0 weights as a contender of kernels/bench.py, called in ggml's own library through ctypes.

The library is built from the source package of llama-cpp-python (a minute; cmake and a C++ compiler):

    pip download --no-deps --no-binary llama-cpp-python -d out/llama llama-cpp-python && tar xf out/llama/*.tar.gz -C out/llama
    cmake -S out/llama/llama_cpp_python-*/vendor/llama.cpp -B out/llama && cmake --build out/llama --target ggml

and given as `--llama-cpp out/llama/bin`. Q4_0 is not quite our format: groups of 32 (0.5625 bytes a weight; here the four groups
in one of ours all have its scale, so that the weights are the same numbers), and activations are rounded to int8 in blocks of 32.
Weights lie as llama.cpp has them, in the interleaved form it makes at load time. x and y are float32, as in its own graphs.
"""
from __future__ import annotations

import ctypes
import pathlib
import weakref

import torch
from bench_contenders import Contender, Layer

F32, Q4_0 = 0, 2  # enum ggml_type
BLOCK = 32  # weights of a Q4_0 block
POINTER, LONG, SIZE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_size_t
LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, POINTER)


class InitParams(ctypes.Structure):
    _fields_ = [("mem_size", SIZE), ("mem_buffer", POINTER), ("no_alloc", ctypes.c_bool)]


SIGNATURES = {  # result, arguments
    "ggml_log_set": (None, LOG, POINTER), "ggml_init": (POINTER, InitParams), "ggml_free": (None, POINTER),
    "ggml_tensor_overhead": (SIZE,), "ggml_graph_overhead_custom": (SIZE, SIZE, ctypes.c_bool),
    "ggml_new_tensor_2d": (POINTER, POINTER, ctypes.c_int, LONG, LONG), "ggml_mul_mat": (POINTER, POINTER, POINTER, POINTER),
    "ggml_new_graph_custom": (POINTER, POINTER, SIZE, ctypes.c_bool), "ggml_build_forward_expand": (None, POINTER, POINTER),
    "ggml_backend_cpu_init": (POINTER,), "ggml_backend_cpu_set_n_threads": (None, POINTER, ctypes.c_int),
    "ggml_backend_get_device": (POINTER, POINTER), "ggml_backend_dev_backend_reg": (POINTER, POINTER),
    "ggml_backend_reg_get_proc_address": (POINTER, POINTER, ctypes.c_char_p),
    "ggml_backend_cpu_buffer_type": (POINTER,), "ggml_backend_buft_name": (ctypes.c_char_p, POINTER),
    "ggml_backend_alloc_ctx_tensors_from_buft": (POINTER, POINTER, POINTER), "ggml_backend_buffer_free": (None, POINTER),
    "ggml_backend_tensor_set": (None, POINTER, POINTER, SIZE, SIZE),
    "ggml_backend_cpu_buffer_from_ptr": (POINTER, POINTER, SIZE),
    "ggml_backend_tensor_alloc": (ctypes.c_int, POINTER, POINTER, POINTER),
    "ggml_backend_graph_compute": (ctypes.c_int, POINTER, POINTER),
}


def q4_0_blocks(layer: Layer) -> torch.Tensor:
    """uint8 [n, k / 32, 18]: a float16 scale, then 16 bytes, of which byte i holds codes i (low) and i + 16."""
    n, k = layer.codes.shape
    codes = layer.codes.view(n, k // BLOCK, BLOCK)
    scales = layer.scales.repeat_interleave(layer.group_size // BLOCK, 1).half()
    return torch.cat([scales.unsqueeze(-1).view(torch.uint8), codes[..., :16] | codes[..., 16:] << 4], -1)


class Ggml:
    """The library in `folder` and its CPU backend with as many threads as torch has.

    Raises FileNotFoundError when a file is missing, RuntimeError when the library has no interleaved form for this CPU.
    """

    def __init__(self, folder: pathlib.Path):
        loaded = []
        for name in ("ggml-base", "ggml-cpu", "ggml"):  # each needs those before it
            if not (path := folder / f"lib{name}.so").is_file():
                raise FileNotFoundError(f"no {path.name} in {folder}; how to build it: {pathlib.Path(__file__).name}")
            loaded.append(ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL))
        for name, (result, *arguments) in SIGNATURES.items():
            function = next(getattr(library, name) for library in loaded if hasattr(library, name))
            function.restype, function.argtypes = result, arguments
            setattr(self, name.removeprefix("ggml_"), function)
        self.silence = LOG(lambda level, text, data: None)  # it says "repack" for every tensor
        self.log_set(self.silence, None)
        self.backend = self.backend_cpu_init()
        self.backend_cpu_set_n_threads(self.backend, torch.get_num_threads())
        self.interleaved = self.weight_type()
        self.results: dict[tuple[int, int], torch.Tensor] = {}

    def weight_type(self) -> int:
        """The buffer type whose tensors are interleaved when they are set."""
        registry = self.backend_dev_backend_reg(self.backend_get_device(self.backend))
        address = self.backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        types = ctypes.CFUNCTYPE(ctypes.POINTER(POINTER), POINTER)(address)(self.backend_get_device(self.backend))
        named = {}
        for buffer_type in types:
            if not buffer_type:  # the list ends with NULL
                break
            named[self.backend_buft_name(buffer_type)] = buffer_type
        if b"CPU_REPACK" not in named:
            raise RuntimeError(f"ggml has no CPU_REPACK weights here, only {named}; build it with -DGGML_CPU_REPACK=ON")
        return named[b"CPU_REPACK"]

    def context(self, tensors: int, graph: bool = False) -> int:
        """For that many tensors, and a graph: their descriptions, not their data."""
        size = tensors * self.tensor_overhead() + (self.graph_overhead_custom(8, False) if graph else 0)
        return self.init(InitParams(size + 1024, None, True))

    def wrap(self, tensor: int, data: torch.Tensor) -> int:
        """Give a ggml tensor the memory of a torch tensor; returns the buffer, to be freed."""
        buffer = self.backend_cpu_buffer_from_ptr(data.data_ptr(), data.nbytes)
        self.backend_tensor_alloc(buffer, tensor, data.data_ptr())
        return buffer

    def release(self, contexts: list[int], buffers: list[int]) -> None:
        for buffer in buffers:
            self.backend_buffer_free(buffer)
        for context in contexts:
            self.free(context)


class Weights:
    """W of one layer, in ggml's memory, and a graph for every x it has met."""

    def __init__(self, ggml: Ggml, blocks: torch.Tensor):
        self.ggml, self.blocks, self.graphs = ggml, blocks.contiguous(), {}
        self.n, self.k = blocks.shape[0], blocks.shape[1] * BLOCK
        context = ggml.context(1)
        self.tensor = ggml.new_tensor_2d(context, Q4_0, self.k, self.n)
        buffer = ggml.backend_alloc_ctx_tensors_from_buft(context, ggml.interleaved)
        ggml.backend_tensor_set(self.tensor, self.blocks.data_ptr(), 0, self.blocks.nbytes)
        self.contexts, self.buffers = [context], [buffer]
        weakref.finalize(self, ggml.release, self.contexts, self.buffers)

    def tensors(self) -> list[torch.Tensor]:
        return [self.blocks]

    def clone(self) -> Weights:
        return Weights(self.ggml, self.blocks)

    def graph(self, x: torch.Tensor) -> tuple[int, torch.Tensor]:
        """The product of this very x [m, k], and the y [m, n] that it writes, which all weights of this shape share."""
        ggml, m = self.ggml, x.shape[0]
        y = ggml.results.setdefault((m, self.n), torch.empty(m, self.n))
        context = ggml.context(2, graph=True)
        source = ggml.new_tensor_2d(context, F32, self.k, m)
        product = ggml.mul_mat(context, self.tensor, source)
        self.contexts.append(context)
        self.buffers += [ggml.wrap(source, x), ggml.wrap(product, y)]
        graph = ggml.new_graph_custom(context, 8, False)
        ggml.build_forward_expand(graph, product)
        return graph, y

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """x float32 [m, k], contiguous -> y, overwritten by the next call of this shape. Raises RuntimeError when ggml fails."""
        key = x.data_ptr(), x.shape[0]
        if key not in self.graphs:
            self.graphs[key] = self.graph(x)
        graph, y = self.graphs[key]
        if status := self.ggml.backend_graph_compute(self.ggml.backend, graph):
            raise RuntimeError(f"ggml_backend_graph_compute returned {status}")
        return y


def llama_cpp(folder: pathlib.Path) -> Contender:
    """Raises as `Ggml` does."""
    ggml = Ggml(folder)

    def supports(p):
        return None if p.n % 8 == 0 and p.group_size % BLOCK == 0 else "needs N % 8 == 0 and groups of multiples of 32"

    def prepare(layer):
        return Weights(ggml, q4_0_blocks(layer))
    return Contender("llama.cpp Q4_0", "peer", supports, prepare, lambda x, w: w.multiply(x), torch.float32,
                     activations="int8 in blocks of 32")
