"""A page in headless Chromium, over its debugging pipe: what a person sees, asked by a program. No library is needed."""

from __future__ import annotations

import base64
import json
import os
import pathlib
import shutil
import subprocess
import sys

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# Chromium reads commands from descriptor 3 and answers on 4; both may be taken at first.
PIPES = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 10) for fd in sys.argv[1:3]]
os.dup2(ends[0], 3), os.dup2(ends[1], 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


def find() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """Opens one page of a file. Use as a context manager. messages: what Chromium told on its own: requests, log entries."""

    def __init__(self, page: pathlib.Path, profile: pathlib.Path):
        self.page, self.profile, self.count, self.messages = page, profile, 0, []

    def __enter__(self) -> Browser:
        read, self._to = os.pipe()
        self._from, write = os.pipe()
        options = ["--headless=new", "--remote-debugging-pipe", f"--user-data-dir={self.profile}", "--no-first-run"]
        options += ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium refuses to be root in its sandbox
        self.process = subprocess.Popen(
            [sys.executable, "-c", PIPES, str(read), str(write), find(), *options],
            pass_fds=(read, write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read), os.close(write)
        self._rest, self.session = b"", None
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.ask(f"{domain}.enable")
        self.show()
        self.ask("Page.navigate", url=self.page.absolute().as_uri())
        self._wait(lambda message: message.get("method") == "Page.loadEventFired")
        return self

    def __exit__(self, *_) -> None:
        self.process.terminate()
        self.process.wait(10)
        os.close(self._to), os.close(self._from)

    def ask(self, method: str, **parameters) -> dict:
        """One command of the DevTools protocol, and its result."""
        self.count += 1
        number = self.count
        message = {"id": number, "method": method, "params": parameters, **({"sessionId": self.session} if self.session else {})}
        os.write(self._to, json.dumps(message).encode() + b"\0")
        answer = self._wait(lambda message: message.get("id") == number)
        assert "error" not in answer, answer
        return answer["result"]

    def run(self, script: str):
        """The value of a JavaScript expression in the page."""
        result = self.ask("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def show(self, width: int = 1280, height: int = 900, scheme: str = "light") -> None:
        """Size of the window, and the colours its user prefers."""
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def screenshot(self, path: pathlib.Path) -> None:
        """The whole page as PNG."""
        path.write_bytes(base64.b64decode(self.ask("Page.captureScreenshot", captureBeyondViewport=True)["data"]))

    def _wait(self, wanted) -> dict:
        while True:
            while b"\0" not in self._rest:
                data = os.read(self._from, 1 << 20)
                assert data, "Chromium ended"
                self._rest += data
            line, _, self._rest = self._rest.partition(b"\0")
            message = json.loads(line)
            if wanted(message):
                return message
            self.messages.append(message)
