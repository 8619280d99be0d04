"""A headless Chromium, driven over its DevTools protocol."""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from websockets.sync.client import ClientConnection, connect

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
START_S = 60.0
REPLY_S = 60.0


def find_browser() -> str | None:
    """The first Chromium on PATH."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Tab:
    """One page. `errors` collects exceptions and warnings, `requests` the requested URLs."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self.errors: list[str] = []
        self.requests: list[str] = []
        self._events: list[str] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> Mapping[str, Any]:
        """Call a method of the protocol and wait for its result; raises AssertionError if it fails."""
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(timeout=REPLY_S))
            if message.get("id") == number:
                assert "error" not in message, message["error"]
                return dict(message["result"])
            self._note(message)

    def _note(self, event: Mapping[str, Any]) -> None:
        name, details = event["method"], event["params"]
        self._events.append(name)
        if name == "Runtime.exceptionThrown":
            self.errors.append(str(details["exceptionDetails"]))
        elif name == "Runtime.consoleAPICalled" and details["type"] in ("error", "warning", "assert"):
            self.errors.append(str(details["args"]))
        elif name == "Log.entryAdded" and details["entry"]["level"] in ("error", "warning"):
            self.errors.append(str(details["entry"]))
        elif name == "Network.requestWillBeSent":
            self.requests.append(details["request"]["url"])

    def open(self, path: Path, *, width: int, height: int = 900, dark: bool = False) -> None:
        """Load a file in a window of that size and wait for its load event."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.resize(width, height)
        self._events.clear()
        self.send("Page.navigate", url=path.absolute().as_uri())
        while "Page.loadEventFired" not in self._events:
            self._note(json.loads(self._socket.recv(timeout=REPLY_S)))

    def resize(self, width: int, height: int) -> None:
        """Resize the window."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def value(self, expression: str) -> Any:
        """Evaluate a JavaScript expression to JSON values."""
        found = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def press(self, key: str, code: int) -> None:
        """Press and release a key."""
        for kind in ("rawKeyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def screenshot(self, path: Path, *, whole: bool = False) -> Path:
        """A PNG of the window, or of the whole page."""
        found = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(found["data"]))
        return path


@contextmanager
def browser_tab(program: str, profile: Path) -> Iterator[Tab]:
    """Start a browser with one page; it ends with the block."""
    command = [program, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
    command += ["--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, **quiet, start_new_session=True)
    try:
        with connect(_page_address(process, profile), max_size=None, proxy=None) as socket:
            yield Tab(socket)
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # a distribution's browser is a script that starts the program
        process.wait(timeout=20)


def _page_address(process: subprocess.Popen[bytes], profile: Path) -> str:
    """The WebSocket address of the browser's first page; the browser writes its port into its profile."""
    deadline, port_file = time.monotonic() + START_S, profile / "DevToolsActivePort"
    while time.monotonic() < deadline and process.poll() is None:
        lines = port_file.read_text().split() if port_file.is_file() else []
        if lines:
            pages = httpx.get(f"http://127.0.0.1:{lines[0]}/json/list", trust_env=False, timeout=REPLY_S).json()
            found = [page["webSocketDebuggerUrl"] for page in pages if page["type"] == "page"]
            if found:
                return str(found[0])
        time.sleep(0.05)
    raise AssertionError(f"{process.args} did not start within {START_S:.0f} s (exit status {process.poll()})")
