"""The explorer's server answers this machine's own page only: any web page can send requests to a loopback port."""

import http.client
import json
import socket
import threading

import pytest

from mxd.explorer.server import MAX_BODY, ExplorerServer


def echo(question):
    return {"got": question}


def refuse(question):
    raise ValueError("no such expert")


def fail(question):
    raise RuntimeError("out of memory")


@pytest.fixture
def server():
    data = {"index.json": {"name": "ünï\ud800", "odd": float("nan")}}
    with ExplorerServer(data.get, {"echo": echo, "refuse": refuse, "fail": fail}) as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def request(server, method, path, body=None, **headers):
    """Send a request with the headers of the server's own page, unless others are given; None leaves one out."""
    host = f"127.0.0.1:{server.server_port}"
    ours = {"Host": host} | ({"Content-Type": "application/json"} if method == "POST" else {})
    ours |= {name.replace("_", "-"): value for name, value in headers.items()}
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    connection.putrequest(method, path, skip_host=True)
    if body is not None and "Content_Length" not in headers:
        ours["Content-Length"] = str(len(body))
    for name, value in ours.items():
        if value is not None:
            connection.putheader(name, value)
    connection.endheaders(body)
    reply = connection.getresponse()
    content = reply.read()
    connection.close()
    return reply, content


def post(server, path, question=None, **headers):
    body = json.dumps({} if question is None else question).encode()
    return request(server, "POST", path, body, **headers)


@pytest.mark.parametrize("path", ["/", "/index.html", "/app.js", "/style.css", "/data/index.json", "/?a=b"])
def test_files_of_the_page(server, path):
    reply, content = request(server, "GET", path)
    assert reply.status == 200 and content
    assert reply.headers["X-Content-Type-Options"] == "nosniff" and "Access-Control-Allow-Origin" not in reply.headers
    if path.endswith("json"):
        assert json.loads(content) == {"name": "ünï?", "odd": None}


@pytest.mark.parametrize(
    "path",
    ["/server.py", "/../server.py", "/%2e%2e/server.py", "/static/app.js", "/data/", "/data/../app.js", "/api/echo",
     "/data/%00", "/etc/passwd"],
)  # fmt: skip
def test_other_files_are_not_there(server, path):
    reply, content = request(server, "GET", path)
    assert reply.status == 404 and json.loads(content)["error"]


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost@evil", "[::1", "", None, "localhost:x"],
)
@pytest.mark.parametrize(("method", "path"), [("GET", "/"), ("GET", "/data/index.json"), ("POST", "/api/echo")])
def test_another_host_is_refused(server, host, method, path):
    reply, content = request(server, method, path, b"{}" if method == "POST" else None, Host=host)
    assert reply.status == 403 and b"localhost" in content


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:1", "[::1]:8080", "localhost:7860"])
def test_loopback_names_are_answered_at_any_port(server, host):
    assert request(server, "GET", "/", Host=host)[0].status == 200
    assert post(server, "/api/echo", Host=host, Origin=f"http://{host}")[0].status == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "https://127.0.0.1", "http://localhost:3000"])
def test_another_origin_is_refused(server, origin):
    assert post(server, "/api/echo", Origin=origin)[0].status == 403


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", None])
def test_a_question_that_any_page_can_send_is_refused(server, kind):
    assert post(server, "/api/echo", Content_Type=kind)[0].status == 415


def test_a_preflight_is_not_granted(server):
    reply, _ = request(server, "OPTIONS", "/api/echo", Origin="http://evil.example")
    assert reply.status == 501 and "Access-Control-Allow-Origin" not in reply.headers


def test_questions_are_answered(server):
    reply, content = post(server, "/api/echo", {"text": "naïve 国家"})
    assert reply.status == 200 and json.loads(content) == {"got": {"text": "naïve 国家"}}
    reply, content = post(server, "/api/refuse")
    assert reply.status == 400 and json.loads(content) == {"error": "no such expert"}
    reply, content = post(server, "/api/fail")
    assert reply.status == 500 and "RuntimeError: out of memory" in json.loads(content)["error"]
    assert post(server, "/api/other")[0].status == 404


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"[]", {}, 400),
        (b"{", {}, 400),
        (b"\xff", {}, 400),
        (b"[" * 60_000, {}, 400),
        (b"{}", {"Content_Length": None}, 411),
        (b"{}", {"Content_Length": "-2"}, 411),
        (b"{}", {"Content_Length": str(MAX_BODY + 1)}, 413),
        (b"{}", {"Content_Length": "9" * 5000}, 413),
    ],
)
def test_nonsense_is_refused(server, body, headers, status):
    reply, content = request(server, "POST", "/api/echo", body, **headers)
    assert reply.status == status and json.loads(content)["error"]
    assert post(server, "/api/echo")[0].status == 200


def test_it_listens_on_loopback_only(server):
    assert server.server_address[0] == "127.0.0.1"
    other = socket.gethostbyname(socket.gethostname())
    if not other.startswith("127."):
        with pytest.raises(OSError):
            socket.create_connection((other, server.server_port), timeout=1).close()
