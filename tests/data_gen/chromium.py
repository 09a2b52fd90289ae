"""A headless Chromium for tests, driven by the DevTools protocol over two pipes: no driver, no port, no websocket."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_PATIENCE = 60.0
_KEYS = {
    "Enter": ("Enter", 13, "\r"),
    "Escape": ("Escape", 27, ""),
    "ArrowDown": ("ArrowDown", 40, ""),
    "ArrowUp": ("ArrowUp", 38, ""),
    "ArrowRight": ("ArrowRight", 39, ""),
    "ArrowLeft": ("ArrowLeft", 37, ""),
}
CONTROL = 2


def find_chromium() -> str | None:
    """Returns the program, installed by Debian's package manager if it is missing and that is allowed."""
    found = next(filter(None, map(shutil.which, _NAMES)), None)
    if found is None and shutil.which("apt-get") and os.geteuid() == 0:
        for command in (["apt-get", "update"], ["apt-get", "install", "-y", "--no-install-recommends", "chromium"]):
            subprocess.run(command, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=900)
        found = shutil.which("chromium")
    return found


class Page:
    """One tab. Waiting ends with a TimeoutError that shows what the page says."""

    def __init__(self, send: int, receive: int) -> None:
        self._send, self._receive, self._number = send, receive, 0
        self._left = b""
        self.errors: list[str] = []
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Sends a command and returns its result; exceptions of the page's own scripts are kept in `errors`."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._send, json.dumps(message).encode() + b"\0")
        while True:
            told = self._message(method)
            if told.get("id") == self._number:
                assert "error" not in told, told["error"]
                return told["result"]
            if told.get("method") == "Runtime.exceptionThrown":
                self.errors.append(str(told["params"]["exceptionDetails"].get("exception", {}).get("description")))
            if told.get("method") == "Log.entryAdded" and told["params"]["entry"]["source"] == "security":
                self.errors.append(told["params"]["entry"]["text"])

    def _message(self, method: str) -> dict[str, Any]:
        until = time.monotonic() + _PATIENCE
        while b"\0" not in self._left:
            ready, _, _ = select.select([self._receive], [], [], max(0.0, until - time.monotonic()))
            piece = os.read(self._receive, 1 << 20) if ready else b""
            if not piece:
                raise TimeoutError(f"Chromium does not answer {method}")
            self._left += piece
        first, self._left = self._left.split(b"\0", 1)
        return json.loads(first)

    def open(self, url: str, width: int = 1360, height: int = 860) -> None:
        """Shows an address in a window of this size."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Page.navigate", url=url)
        self.wait(f"location.href === {json.dumps(url)} && document.readyState === 'complete'")

    def value(self, expression: str) -> Any:
        """Returns the value of a JavaScript expression."""
        told = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    def wait(self, expression: str) -> None:
        """Waits until an expression is true."""
        until = time.monotonic() + _PATIENCE
        while not self.value(f"Boolean({expression})"):
            if time.monotonic() > until:
                raise TimeoutError(f"never true: {expression}; the page says: {self.value('document.body.innerText')}")
            time.sleep(0.03)

    def press(self, key: str, modifiers: int = 0) -> None:
        """Presses and lets go of a key."""
        name, code, text = _KEYS.get(key, (key, ord(key.upper()[0]), key))
        about = {"key": name, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        self.call("Input.dispatchKeyEvent", type="keyDown", text="" if modifiers else text, **about)
        self.call("Input.dispatchKeyEvent", type="keyUp", **about)

    def hold(self, key: str) -> None:
        """Sends what a key that is held down sends while it repeats."""
        about = {"key": key, "windowsVirtualKeyCode": ord(key.upper()), "autoRepeat": True}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=key, **about)

    def write(self, text: str) -> None:
        """Writes into the field that has the focus."""
        self.call("Input.insertText", text=text)

    def screenshot(self, path: Path) -> None:
        """Saves what the window shows as PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


@contextmanager
def chromium(program: str, profile: Path) -> Iterator[Page]:
    """Runs a headless Chromium with a profile of its own and ends it."""
    their_input, our_output = os.pipe()
    our_input, their_output = os.pipe()
    options = [
        "--headless=new",
        "--remote-debugging-pipe",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--disable-extensions",
        "--disable-background-networking",
        "--disable-sync",
        "--mute-audio",
        "--hide-scrollbars",
    ]
    # Chromium reads commands from descriptor 3 and answers on 4. Not sh: dash knows descriptors of one digit only.
    shell = f'exec "$@" 3<&{their_input} 4>&{their_output}'
    process = subprocess.Popen(
        ["bash", "-c", shell, "bash", program, *options, f"--user-data-dir={profile}", "about:blank"],
        pass_fds=(their_input, their_output),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(their_input)
    os.close(their_output)
    try:
        yield Page(our_output, our_input)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(our_output)
        os.close(our_input)
