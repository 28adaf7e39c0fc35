"""A headless Chromium that opens a page from a file, with no network, and tells what happened.

It is driven by the DevTools protocol through two pipes (--remote-debugging-pipe): messages are JSON
with a zero byte after each, so neither a port nor a library is needed.
"""

from __future__ import annotations

import base64
import contextlib
import io
import itertools
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image as PILImage

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
ABSENT = "no headless Chromium on this machine (Debian: apt-get install chromium-headless-shell)"
_PATIENCE = 60  # seconds for any answer, on a machine that does other things too


def find() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """One open page; ``problems`` are console errors and exceptions, ``requests`` addresses."""

    def __init__(self, process: subprocess.Popen[bytes], write: int, read: int) -> None:
        self._process, self._write, self._read = process, write, read
        self._numbers = itertools.count(1)
        self._rest = b""
        self._session: str | None = None
        self._loaded = False
        self.problems: list[str] = []
        self.requests: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **arguments: Any) -> dict[str, Any]:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": arguments}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self._note(answer)

    def open(self, path: Path, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        self._loaded = False
        self.problems.clear()
        self.requests.clear()
        self.call("Page.navigate", url=path.absolute().as_uri())
        while not self._loaded:
            self._note(self._receive())

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression; a promise is waited for."""
        answer = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def asked_for_nothing_else(self) -> bool:
        """Whether the page was the only thing requested."""
        return [url for url in self.requests if not url.startswith(("data:", "blob:"))] == [
            self.evaluate("location.href")
        ]

    def wait(self, expression: str) -> None:
        """Until a JavaScript expression is true."""
        end = time.monotonic() + _PATIENCE
        while not self.evaluate(f"Boolean({expression})"):
            assert time.monotonic() < end, f"never true: {expression}"
            time.sleep(0.02)

    def screenshot(self) -> PILImage.Image:
        """The whole page, from top to bottom."""
        data = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        return PILImage.open(io.BytesIO(base64.b64decode(data))).convert("RGB")

    def _note(self, event: dict[str, Any]) -> None:
        method, facts = event.get("method"), event.get("params", {})
        if method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Network.requestWillBeSent":
            self.requests.append(facts["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(facts["exceptionDetails"]))
        elif method == "Log.entryAdded" and facts["entry"]["level"] in ("error", "warning"):
            self.problems.append(facts["entry"]["text"])
        elif method == "Runtime.consoleAPICalled" and facts["type"] in ("error", "warning"):
            self.problems.append(json.dumps(facts["args"]))

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._read], [], [], _PATIENCE)
            assert ready, "the browser does not answer"
            data = os.read(self._read, 1 << 20)
            assert data, f"the browser ended with {self._process.wait()}"
            self._rest += data
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)


@contextlib.contextmanager
def browser() -> Iterator[Page]:
    """A browser with a fresh profile that cannot resolve any name."""
    program = find()
    assert program is not None, ABSENT
    to_browser, from_browser = os.pipe(), os.pipe()

    def wire() -> None:  # the protocol's pipes are numbers 3 (commands) and 4 (answers)
        commands, answers = os.dup(to_browser[0]), os.dup(from_browser[1])
        os.dup2(commands, 3)
        os.dup2(answers, 4)

    with tempfile.TemporaryDirectory() as profile:
        process = subprocess.Popen(
            [
                program,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--no-first-run",
                "--disable-background-networking",
                "--host-resolver-rules=MAP * ~NOTFOUND",
                "--remote-debugging-pipe",
                f"--user-data-dir={profile}",
            ],
            preexec_fn=wire,
            close_fds=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser[0])
        os.close(from_browser[1])
        try:
            yield Page(process, to_browser[1], from_browser[0])
        finally:
            os.write(to_browser[1], b'{"id": 0, "method": "Browser.close"}\0')
            process.wait(_PATIENCE)
            os.close(to_browser[1])
            os.close(from_browser[0])
