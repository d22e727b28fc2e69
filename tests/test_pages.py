"""Memory for weights: tensors apart from each other, whole, aligned, given back; in huge pages where the system gives them."""

import gc
import pathlib
import threading

import pytest
import torch
from foem_kernels import pages

ENABLED = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")


def test_tensors_do_not_overlap_and_begin_on_cache_lines():
    shapes = [(3, 5), (1,), (0, 7), (1000, 33), (64,)]
    tensors = [pages.empty(shape, dtype) for shape in shapes for dtype in (torch.int32, torch.uint8, torch.float32)]
    for i, t in enumerate(tensors):
        t.fill_(i)
    for i, t in enumerate(tensors):
        assert t.is_contiguous() and t.data_ptr() % pages.LINE == 0 and bool((t == i).all())
    assert [tuple(t.shape) for t in tensors[::3]] == shapes


def test_threads_get_memory_of_their_own():
    found = []

    def ask(i):
        found.extend((i, pages.empty((4096,), torch.int32).fill_(i)) for _ in range(200))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 800 and all(bool((t == i).all()) for i, t in found)


def resident(field: str) -> int:
    """Bytes of this process: a field of smaps_rollup, as AnonHugePages."""
    lines = pathlib.Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


@pytest.mark.skipif(not ENABLED.is_file() or "[never]" in ENABLED.read_text(), reason="the system gives no huge pages")
def test_large_tensors_lie_in_huge_pages_and_go_with_the_last_one():
    before = resident("AnonHugePages")
    tensors = [pages.empty((24 << 20,), torch.uint8).zero_() for _ in range(8)]
    assert resident("AnonHugePages") - before >= 128 << 20
    tensors.clear()
    pages.empty((pages.ARENA,), torch.uint8)  # a new arena, so that the last one is let go too
    gc.collect()
    assert resident("AnonHugePages") - before <= pages.ARENA
