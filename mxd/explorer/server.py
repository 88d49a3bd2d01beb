"""Serve the explorer on this machine: its page, its data as JSON, and calls of the model.

Any web page that is open in a browser can send requests to this machine. So only requests to a loopback name are
answered (a page whose own name is made to lead here has another `Host`), and the model is only called by JSON, which a
browser sends to another site after asking it for permission, which is never given.
"""

import json
import logging
import re
import threading
from collections.abc import Callable, Mapping
from functools import lru_cache
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from mxd.base.files import json_line

logger = logging.getLogger(__name__)

ADDRESS = "127.0.0.1"
STATIC = Path(__file__).parent / "static"
MAX_BODY = 64 * 1024
"""Bytes of a question."""
_LOOPBACK = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:\d{1,5})?")
_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".json": "application/json"}
_HEADERS = {
    "X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY", "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache",
}  # fmt: skip

Call = Callable[[Mapping[str, Any]], Any]


class ExplorerServer(ThreadingHTTPServer):
    """A server of the explorer on 127.0.0.1.

    Args:
        data: returns the value of a path below `data/`, or None if there is none; called by one thread at a time.
        calls: what `api/NAME` answers to a JSON object; called by one thread at a time. A `ValueError` is the user's.
        port: 0 for any that is free.
    """

    daemon_threads = True

    def __init__(self, data: Callable[[str], Any], calls: Mapping[str, Call], port: int = 0):
        self.calls, self.calling, self._reading = calls, threading.Lock(), threading.Lock()
        self._encoded = lru_cache(64)(lambda path: None if (value := data(path)) is None else json_line(value))
        super().__init__((ADDRESS, port), _Handler)

    def server_close(self) -> None:
        """Close the server after a call that is running."""
        with self.calling:
            super().server_close()

    @property
    def url(self) -> str:
        """The address of the page."""
        return f"http://{ADDRESS}:{self.server_port}/"

    def read(self, path: str) -> bytes | None:
        """Return the bytes of a file of the site, or None."""
        if path.startswith("data/"):
            with self._reading:
                return self._encoded(path.removeprefix("data/"))
        static = {file.name: file for file in STATIC.iterdir()}.get(path or "index.html")
        return static.read_bytes() if static else None


class _Refused(Exception):
    """A request that is answered with a status and a message."""

    def __init__(self, status: HTTPStatus, message: str):
        super().__init__(message)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    server: ExplorerServer
    protocol_version = "HTTP/1.1"
    timeout = 30

    def do_GET(self) -> None:
        """Answer with a file."""
        self._answer(self._file)

    def do_POST(self) -> None:
        """Answer a question to the model."""
        self._answer(self._call)

    def _answer(self, find: Callable[[], tuple[bytes, str]]) -> None:
        status = HTTPStatus.OK
        try:
            self._check_host()
            body, kind = find()
        except _Refused as refused:
            self.close_connection = True  # its body may be unread
            status, body, kind = refused.status, json_line({"error": str(refused)}), ".json"
        self.send_response(status)
        headers = {**_HEADERS, "Content-Type": f"{_TYPES[kind]}; charset=utf-8", "Content-Length": str(len(body))}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _check_host(self) -> None:
        host = self.headers.get("Host", "")
        if not _LOOPBACK.fullmatch(host):
            raise _Refused(HTTPStatus.FORBIDDEN, f"open this page as http://localhost:{self.server.server_port}/")
        if self.headers.get("Origin", f"http://{host}") != f"http://{host}":
            raise _Refused(HTTPStatus.FORBIDDEN, "the request comes from another site")

    def _file(self) -> tuple[bytes, str]:
        path = unquote(urlsplit(self.path).path).removeprefix("/")
        body = self.server.read(path)
        if body is None:
            raise _Refused(HTTPStatus.NOT_FOUND, "there is no such file")
        return body, Path(path or "index.html").suffix

    def _call(self) -> tuple[bytes, str]:
        call = self.server.calls.get(urlsplit(self.path).path.removeprefix("/api/"))
        if call is None:
            raise _Refused(HTTPStatus.NOT_FOUND, "there is no such call")
        if self.headers.get_content_type() != "application/json":
            raise _Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "send application/json")
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise _Refused(HTTPStatus.LENGTH_REQUIRED, "the request has no Content-Length")
        if len(length) > 9 or int(length) > MAX_BODY:
            raise _Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the request is larger than {MAX_BODY} bytes")
        try:
            question = json.loads(self.rfile.read(int(length)))
            if not isinstance(question, dict):
                raise ValueError("the request must be a JSON object")
            with self.server.calling:
                return json_line(call(question)), ".json"
        except (ValueError, RecursionError) as error:
            raise _Refused(HTTPStatus.BAD_REQUEST, str(error)) from error
        except Exception as error:
            logger.exception("a call of the explorer failed")
            message = f"{type(error).__name__}: {error}"
            raise _Refused(HTTPStatus.INTERNAL_SERVER_ERROR, message) from error

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002, the base class's name
        logger.debug(format, *args)
