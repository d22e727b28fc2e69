"""Where the time goes: seconds by name, without what is measured inside."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


class Clock:
    """`with clock("solve"): ...` adds to clock.seconds["solve"]. On a GPU the time is that of the host, which waits where results
    are needed."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._names: list[str] = []
        self._since = 0.0

    def _pass(self) -> None:
        now = time.perf_counter()
        if self._names:
            self.seconds[self._names[-1]] = self.seconds.get(self._names[-1], 0.0) + now - self._since
        self._since = now

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._pass()
        self._names.append(name)
        try:
            yield
        finally:
            self._pass()
            self._names.pop()
