"""Drive headless Chromium by its DevTools protocol over a pipe: no driver and no package is needed."""

import base64
import fcntl
import io
import json
import os
import shutil
import subprocess
import time

from PIL import Image

EXECUTABLE = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
    "--remote-debugging-pipe",
]  # fmt: skip
KEYS = {
    "Enter": ("Enter", 13, "\r"), "Tab": ("Tab", 9, ""), "ArrowDown": ("ArrowDown", 40, ""), "/": ("Slash", 191, "/"),
    "ArrowUp": ("ArrowUp", 38, ""), "ArrowRight": ("ArrowRight", 39, ""), "ArrowLeft": ("ArrowLeft", 37, ""),
    " ": ("Space", 32, " "),
}  # fmt: skip


class Browser:
    """One page. `errors` has what the console and the network reported."""

    def __init__(self, profile):
        child_reads, write = os.pipe()
        read, child_writes = os.pipe()
        above = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in (child_reads, child_writes)]

        def place():  # Chromium reads from 3 and writes to 4
            os.dup2(above[0], 3)
            os.dup2(above[1], 4)

        command = [EXECUTABLE, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        self.process = subprocess.Popen(command, preexec_fn=place, close_fds=False, stderr=subprocess.DEVNULL)  # noqa: PLW1509
        for fd in (child_reads, child_writes, *above):
            os.close(fd)
        self.write, self.read = os.fdopen(write, "wb", 0), read
        self.buffer, self.sent, self.session, self.errors, self.requests = b"", 0, None, [], []
        targets = self.send("Target.getTargets")["targetInfos"]
        target = next(one["targetId"] for one in targets if one["type"] == "page")
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def close(self):
        self.process.terminate()
        self.process.wait()
        self.write.close()
        os.close(self.read)

    def send(self, method, **parameters):
        self.sent += 1
        message = {"id": self.sent, "method": method, "params": parameters}
        message |= {"sessionId": self.session} if self.session else {}
        self.write.write(json.dumps(message).encode() + b"\0")
        while True:
            reply = self._receive()
            if reply.get("id") == self.sent:
                assert "error" not in reply, (method, reply["error"])
                return reply["result"]
            self._note(reply)

    def _receive(self):
        while b"\0" not in self.buffer:
            data = os.read(self.read, 2**16)
            assert data, "Chromium ended"
            self.buffer += data
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def _note(self, event):
        kind, details = event.get("method"), event.get("params", {})
        if kind == "Runtime.exceptionThrown":
            self.errors.append(details["exceptionDetails"].get("exception", {}).get("description", "an exception"))
        elif kind == "Log.entryAdded" and details["entry"]["level"] in ("error", "warning"):
            self.errors.append(f"{details['entry']['text']} {details['entry'].get('url', '')}")
        elif kind == "Runtime.consoleAPICalled" and details["type"] in ("error", "warning"):
            self.errors.append(str(details["args"]))
        elif kind == "Network.requestWillBeSent":
            self.requests.append(details["request"]["url"])

    def run(self, expression):
        """The value of a JavaScript expression; promises are awaited."""
        how = {"returnByValue": True, "awaitPromise": True}
        result = self.send("Runtime.evaluate", expression=expression, **how)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def until(self, expression, seconds=30):
        """Wait until a JavaScript expression is true."""
        ends = time.monotonic() + seconds
        while not self.run(f"Boolean({expression})"):
            assert time.monotonic() < ends, (expression, self.text("main")[:2000], self.errors)

    def open(self, url):
        self.send("Page.navigate", url="about:blank")
        self.send("Page.navigate", url=url)
        self.settle()

    def settle(self):
        """Wait until the page that the address names is shown."""
        self.until("document.querySelector('main h1') && !document.querySelector('main[aria-busy]')")

    def go(self, address):
        """Follow a link inside of the site: `15/812`."""
        self.run(f"void document.querySelector('h1')?.remove(); location.hash = {json.dumps('#/' + address)}")
        self.settle()

    def text(self, selector="body"):
        return self.run(f"document.querySelector({json.dumps(selector)})?.innerText") or ""

    def press(self, *keys):
        for key in keys:
            code, number, text = KEYS[key]
            how = {"key": key, "code": code, "windowsVirtualKeyCode": number, **({"text": text} if text else {})}
            self.send("Input.dispatchKeyEvent", type="keyDown", **how)
            self.send("Input.dispatchKeyEvent", type="keyUp", key=key, code=code, windowsVirtualKeyCode=number)

    def type(self, text):
        self.send("Input.insertText", text=text)

    def size(self, width, height=800, dark=False):
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.send("Emulation.setDeviceMetricsOverride", **metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, path):
        picture = Image.open(io.BytesIO(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"])))
        picture.convert("RGB").quantize(64).save(path, optimize=True)
