"""A headless Chromium, driven through two pipes by the DevTools protocol, so that tests see a page as people do.

Commands and events are JSON texts with a zero byte after each (``--remote-debugging-pipe``), on the descriptors 3 and 4 of the
browser.
"""

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time

NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
TIMEOUT = 60  # seconds for an answer; a busy machine takes long


def executable():
    """Return the path of a Chromium on this machine, or None."""
    return next((path for path in map(shutil.which, NAMES) if path), None)


# Puts two descriptors where the browser expects them, and becomes the browser.
LAUNCH = """
import fcntl, os, sys
high = [fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3]]
os.dup2(high[0], 3)
os.dup2(high[1], 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Browser:
    """A browser with one tab.

    Attributes:
        requests: addresses that the page has asked for.
        messages: what the page has written to the console, and what the browser has refused it.
    """

    def __init__(self):
        self.requests, self.messages = [], []
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        theirs, self._out = os.pipe()
        self._in, answers = os.pipe()
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
        command = [executable(), *options, f"--user-data-dir={self._folder.name}", "--remote-debugging-pipe", "about:blank"]
        launcher = [sys.executable, "-S", "-E", "-c", LAUNCH, str(theirs), str(answers)]
        quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._process = subprocess.Popen([*launcher, *command], pass_fds=(theirs, answers), start_new_session=True, **quiet)
        os.close(theirs)
        os.close(answers)
        self._buffer, self._number, self._session = b"", 0, None
        targets = self.call("Target.getTargets")["targetInfos"]
        (tab,) = [target["targetId"] for target in targets if target["type"] == "page"][:1]
        self._session = self.call("Target.attachToTarget", targetId=tab, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.call(f"{domain}.enable")

    def call(self, method, **parameters):
        """Send a command; return its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        return self._until(lambda answer: answer.get("id") == self._number, method)

    def show(self, path, width, height, dark=False):
        """Open a file in a window of a size, in the light or in the dark, and wait until it is there."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=path.resolve().as_uri())
        self._until(lambda answer: answer.get("method") == "Page.loadEventFired", "the page")

    def run(self, code):
        """Return the value of an expression in JavaScript, evaluated in the page."""
        result = self.call("Runtime.evaluate", expression=code, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def picture(self, path):
        """Write a PNG of the whole page."""
        data = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))

    def close(self):
        """End the browser."""
        with contextlib.suppress(OSError, AssertionError):
            self.call("Browser.close")
        os.close(self._out)
        os.close(self._in)
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, 9)
            self._process.wait()
        self._folder.cleanup()

    def _until(self, fits, what):
        """Read messages until one fits, keep those that tell what the page does, and return its result."""
        end = time.monotonic() + TIMEOUT
        while True:
            while b"\0" not in self._buffer:
                ready = select.select([self._in], [], [], max(0.0, end - time.monotonic()))[0]
                read = os.read(self._in, 1 << 20) if ready else b""
                assert read, f"no answer to {what}"
                self._buffer += read
            text, _, self._buffer = self._buffer.partition(b"\0")
            message = json.loads(text)
            self._note(message.get("method"), message.get("params", {}))
            if fits(message):
                assert "error" not in message, (what, message["error"])
                return message.get("result", {})

    def _note(self, event, parameters):
        if event == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])
        elif event == "Log.entryAdded":
            self.messages.append(parameters["entry"]["text"])
        elif event in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown"):
            self.messages.append(json.dumps(parameters))
