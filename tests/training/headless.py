"""A page in headless Chromium, and what the browser says of it: requests, console messages, exceptions.

The DevTools protocol is spoken over a pair of pipes (`--remote-debugging-pipe`), JSON messages that end in a zero byte:
no port, no driver, no further dependency.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from select import select
from typing import Any

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
    "--remote-debugging-pipe",
)  # fmt: skip
PATIENCE_S = 60.0


def find_browser() -> str | None:
    """Return the path of an installed Chromium, None if there is none."""
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


@dataclass
class Page:
    """What happened while a page was opened."""

    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    value: Any = None


def open_page(browser: str, url: str, profile: Path, script: str) -> Page:
    """Open `url` with a fresh profile folder, wait for its load event, evaluate `script`, and close the browser."""
    with _devtools(browser, profile) as devtools:
        target = devtools.call("Target.createTarget", url="about:blank")["targetId"]
        session = devtools.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Network", "Log", "Runtime", "Page"):
            devtools.call(f"{domain}.enable", session)
        devtools.call("Page.navigate", session, url=url)
        devtools.wait_for("Page.loadEventFired")
        value = devtools.call("Runtime.evaluate", session, expression=script, returnByValue=True)["result"]["value"]
        # Whatever the page still had to say was said before this answer.
        return Page(_requests(devtools.events), _complaints(devtools.events), value)


def _requests(events: list[dict[str, Any]]) -> list[str]:
    sent = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
    return [request["request"]["url"] for request in sent]


def _complaints(events: list[dict[str, Any]]) -> list[str]:
    found = []
    for event in events:
        parameters = event.get("params", {})
        if event["method"] == "Runtime.exceptionThrown":
            found.append(str(parameters["exceptionDetails"]["text"]))
        elif event["method"] == "Runtime.consoleAPICalled" and parameters["type"] in {"error", "warning", "assert"}:
            found.append(str(parameters["args"]))
        elif event["method"] == "Log.entryAdded" and parameters["entry"]["level"] in {"error", "warning"}:
            found.append(str(parameters["entry"]["text"]))
    return found


class _DevTools:
    """The protocol's messages over two file descriptors."""

    def __init__(self, read: int, write: int) -> None:
        self._read, self._write = read, write
        self._buffer = b""
        self._number = 0
        self._deadline = time.monotonic() + PATIENCE_S
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Send a command and return its result; events that come first are kept."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                result: dict[str, Any] = answer["result"]
                return result

    def wait_for(self, method: str) -> None:
        """Return once that event has come."""
        while not any(event["method"] == method for event in self.events):
            self._receive()

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select([self._read], [], [], max(0.0, self._deadline - time.monotonic()))
            if not ready:
                raise TimeoutError(f"the browser said nothing for {PATIENCE_S:g} s")
            chunk = os.read(self._read, 1 << 16)
            if not chunk:
                raise RuntimeError("the browser closed its pipe")
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        if "method" in message:
            self.events.append(message)
        return message


@contextmanager
def _devtools(browser: str, profile: Path) -> Iterator[_DevTools]:
    """Start the browser, which reads commands from descriptor 3 and answers on descriptor 4."""
    command_read, command_write = os.pipe()
    answer_read, answer_write = os.pipe()
    # A shell's redirection, because only between fork and exec is it safe to take those two. Not sh: it may know no
    # descriptor above 9.
    start = f'exec "$0" "$@" 3<&{command_read} 4>&{answer_write}'
    arguments = [browser, *FLAGS, f"--user-data-dir={profile}"]
    process = subprocess.Popen(
        ["bash", "-c", start, *arguments],
        pass_fds=(command_read, answer_write),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(command_read)
    os.close(answer_write)
    try:
        yield _DevTools(answer_read, command_write)
    finally:
        process.kill()
        process.wait()
        os.close(answer_read)
        os.close(command_write)
