"""Headless Chromium for tests of pages, over its own pipe: no driver, no package, no network."""

import base64
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile

START = """
import fcntl, os, sys
handles = [fcntl.fcntl(int(number), fcntl.F_DUPFD, 50) for number in sys.argv[1:3]]
for handle, place in zip(handles, (3, 4)):  # Chromium reads its commands from handle 3 and answers on handle 4
    os.dup2(handle, place)
os.execv(sys.argv[3], sys.argv[3:])
"""
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome", "headless_shell")


def chromium():
    """The program; None if there is none. CHROMIUM names another one."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """A page in a browser of its own. `with Page(file) as page: page.show(390, dark=True); page.run("1 + 1")`."""

    def __init__(self, file):
        self.file, self.numbers = file, itertools.count(1)

    def __enter__(self):
        self.home = tempfile.mkdtemp()
        to_browser, self.write = os.pipe()
        self.read, from_browser = os.pipe()
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
        program = [chromium(), *options, f"--user-data-dir={self.home}", "--remote-debugging-pipe", "about:blank"]
        wrapped = [sys.executable, "-c", START, str(to_browser), str(from_browser), *program]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(wrapped, pass_fds=(to_browser, from_browser), **quiet)
        os.close(to_browser)
        os.close(from_browser)
        self.rest = b""
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.ask("Page.enable")
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        os.close(self.write)
        os.close(self.read)
        shutil.rmtree(self.home, ignore_errors=True)

    session = None

    def ask(self, method, **parameters):
        """The result of a command of the DevTools protocol."""
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        return self._answer(lambda said: said.get("id") == number)["result"]

    def _answer(self, wanted):
        while True:
            while b"\0" not in self.rest:
                more = os.read(self.read, 1 << 20)
                assert more, "the browser has ended"
                self.rest += more
            line, _, self.rest = self.rest.partition(b"\0")
            said = json.loads(line)
            assert "error" not in said, said
            if wanted(said):
                return said

    def show(self, width, *, dark=False, medium="screen"):
        """Loads the page at a width, in CSS pixels."""
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", media=medium, features=[scheme])
        self.ask("Page.navigate", url=self.file.absolute().as_uri())
        self._answer(lambda said: said.get("method") == "Page.loadEventFired")

    def run(self, script):
        """The value of a script in the page."""
        result = self.ask("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def picture(self, file):
        """The whole page as PNG."""
        data = self.ask("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        file.write_bytes(base64.b64decode(data))
