"""Processor seconds of the stages that scale_model counts, in a run of `quantize`: functions are timed, less what is timed inside
them. On one thread other work on the machine hardly changes them; waiting for disks is not in them."""

from __future__ import annotations

import functools
import importlib
import time

import torch

# Stage: (module, what is in it)
TIMED = {
    "load": [("foem_vllm.job", "Job.load")],
    "forward": [("foem_vllm.stream", "BlockInputs.run")],
    "moments": [("foem_vllm.capture", "Moments.add")],
    "merge": [("foem_vllm.capture", "Moments.means"), ("foem_vllm.selection", "merge")],
    "factor": [("torch.linalg", "cholesky_ex"), ("foem_vllm.solver", "upper_inverse")],
    "rows": [("foem_vllm.selection", "fit_strength"), ("foem_vllm.selection", "descent_helps"), ("foem_vllm.rows", "solve_rows")],
    "descent": [("foem_vllm.solver", "descend")],
    "round": [("foem_vllm.solver", "find_grid"), ("foem_vllm.solver", "refit_scales"), ("foem_vllm.solver", "pick")],
    "write": [("foem_vllm.writer", "Writer.add_linear"), ("foem_vllm.writer", "Writer.finish")],
}


class Stopwatch:
    """A context in which the functions of TIMED are timed. seconds: by stage, of all threads of the process."""

    def __init__(self):
        self.seconds = dict.fromkeys(TIMED, 0.0)
        self._inside: list[float] = []  # of each function that is running: seconds spent in timed ones that it called
        self._before: list[tuple] = []

    def __enter__(self) -> Stopwatch:
        for stage, places in TIMED.items():
            for module, path in places:
                owner = importlib.import_module(module)
                *outer, name = path.split(".")
                owner = functools.reduce(getattr, outer, owner)
                self._before.append((owner, name, getattr(owner, name)))
                setattr(owner, name, self._timed(stage, getattr(owner, name)))
        return self

    def __exit__(self, *_) -> None:
        for owner, name, function in self._before:
            setattr(owner, name, function)

    def _timed(self, stage: str, function):
        @functools.wraps(function)
        def call(*arguments, **named):
            started = time.process_time()
            self._inside.append(0.0)
            try:
                result = function(*arguments, **named)
            finally:
                spent = time.process_time() - started
                self.seconds[stage] += spent - self._inside.pop()
                if self._inside:
                    self._inside[-1] += spent
            return self._timed(stage, result) if function.__name__ == "pick" else result  # pick returns what does the work

        return call


def one_step(count: int = 2000) -> float:
    """Seconds of a torch operation on almost nothing."""
    x = torch.zeros(64)
    started = time.process_time()
    for _ in range(count):
        x.add_(1)
    return (time.process_time() - started) / count
