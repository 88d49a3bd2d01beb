"""A Hugging Face Hub on loopback, in memory, for the real client: endpoints as huggingface_hub 2.4 calls them.

Faults are injected by `fail`: a status, a dropped connection, half of a body, or a reply that is lost after the deed.
"""

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlencode, urlsplit

import yaml

PAGE = 2
TOKEN = "hf_loopback"
REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    likes: int = 0
    sdk: str | None = None  # of a Space
    commits: list[dict[str, Any]] = field(default_factory=list)
    refs: dict[str, str] = field(default_factory=dict)  # branch → sha
    tags: dict[str, str] = field(default_factory=dict)
    pulls: int = 0

    def add(self, branch, files, title, description=""):
        sha = hashlib.sha1(f"{len(self.commits)}{title}{description}{id(self)}".encode()).hexdigest()
        date = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        self.commits.append(
            {"sha": sha, "files": files, "title": title, "message": description, "date": date,
             "parent": self.refs.get(branch)}
        )  # fmt: skip
        self.refs[branch] = sha
        return sha

    def commit(self, revision):
        sha = self.refs.get(revision) or self.tags.get(revision) or revision
        return next((commit for commit in self.commits if commit["sha"] == sha), None)


@dataclass
class Fault:
    method: str
    pattern: str
    status: int
    times: int
    mode: str
    after: int


class Reply(Exception):
    def __init__(self, status, body=b"", headers=None):
        super().__init__(status)
        self.status, self.headers = status, dict(headers or {})
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode()
        if not isinstance(body, bytes):
            self.headers.setdefault("Content-Type", "application/json")


@lru_cache
def read_card(text):
    """Metadata of a card as JSON has it; none where it is no mapping, or so hostile that it would stop the server."""
    if len(text) > 200_000 or b"&" in text:
        return {}
    try:
        card = yaml.load(text, yaml.CSafeLoader)
        return json.loads(json.dumps(card, default=str)) if isinstance(card, dict) else {}
    except (yaml.YAMLError, RecursionError, TypeError):
        return {}


def error(status, code, message="", **body):
    return Reply(status, {"error": message or code, **body}, {"X-Error-Code": code, "X-Error-Message": message or code})


class HubServer:
    """`with HubServer() as hub: …`; `hub.url`, `hub.token`."""

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, int]] = []  # method, path, bytes of the reply's body
        self.received: Counter[tuple[str, str]] = Counter()  # method, path → bytes of whole bodies
        self.faults: list[Fault] = []
        self.token = TOKEN
        self.lock = threading.Lock()

    def __enter__(self):
        hub = self

        class Handler(_Handler):
            server_state = hub

        self.http = _Server(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.fail("*", "", times=10**9, mode="drop")  # also on connections that are still open
        self.http.shutdown()
        self.http.server_close()

    def fail(self, method, pattern, status=503, times=1, mode="status", after=0):
        """Fail the calls that match: mode "status", "drop" (no reply, nothing done), "half" (half of the body), or
        "lost" (done, but no reply). The first `after` such calls are spared."""
        self.faults.append(Fault(method, pattern, status, times, mode, after))

    def files(self, repo, revision="main"):
        commit = self.repos[repo].commit(revision) if repo in self.repos else None
        return commit["files"] if commit else {}

    def create(self, repo, files=None, **options):
        self.repos[repo] = Repo(**options)
        return self.repos[repo].add("main", dict(files or {}), "initial commit")

    def fault(self, method, path):
        with self.lock:
            for fault in self.faults:
                if fault.method in (method, "*") and fault.times and re.search(fault.pattern, path):
                    if fault.after:
                        fault.after -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None


class _Server(ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        pass  # a client that hung up is no news


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # A reply in one packet: in two, the second waits 40 ms for the client to acknowledge the first.
    wbufsize = -1
    disable_nagle_algorithm = True
    server_state: HubServer

    def log_message(self, *_):
        pass

    def handle_any(self):  # noqa: C901
        hub, method = self.server_state, self.command
        address = urlsplit(self.path)
        path, self.query = unquote(address.path), parse_qs(address.query)
        fault = hub.fault(method, path)
        length = int(self.headers.get("Content-Length") or 0)
        if fault and fault.mode == "half" and method != "GET":
            self.rfile.read(length // 2)
            return self.hang_up()
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = self.read_chunks()
        else:
            self.body = self.rfile.read(length)
        hub.received[method, path] += len(self.body)
        if fault and fault.mode == "drop":
            return self.hang_up()
        if fault and fault.mode == "status":
            reply = error({401: 401, 403: 403}.get(fault.status, fault.status), _CODES.get(fault.status, "Injected"))
        else:
            try:
                with hub.lock:
                    reply = self.route(method, path)
            except Reply as raised:
                reply = raised
        if fault and fault.mode == "lost":
            return self.hang_up()
        half = bool(fault and fault.mode == "half")
        hub.requests.append((method, path, 0 if method == "HEAD" else len(reply.body)))
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        if "Content-Length" not in reply.headers:
            self.send_header("Content-Length", str(len(reply.body)))
        self.end_headers()
        if method != "HEAD":
            self.wfile.write(reply.body[: len(reply.body) // 2] if half else reply.body)
        if half:
            self.hang_up()

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    def hang_up(self):
        self.close_connection = True
        self.wfile.flush()
        self.connection.close()

    def read_chunks(self):
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    # What the Hub does

    def route(self, method, path):
        for verb, pattern, action in _ROUTES:
            match = re.fullmatch(pattern, re.sub("^/api/spaces/", "/api/models/", path))  # one list holds both
            if match and verb == method:
                return getattr(self, action)(**match.groupdict())
        return error(404, "EntryNotFound", f"no such endpoint: {method} {path}")

    @property
    def known(self):
        return self.headers.get("Authorization") == f"Bearer {self.server_state.token}"

    def writer(self):
        if not self.known:
            raise error(401, "Unauthorized", "Invalid username or password.")

    def find(self, name, revision=None):
        repo = self.server_state.repos.get(name)
        if repo is None or (repo.private and not self.known):
            raise error(404 if self.known else 401, "RepoNotFound", "Repository not found")
        if revision is None:
            return repo, None
        commit = repo.commit(unquote(revision))
        if commit is None:
            raise error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repo, commit

    def whoami(self):
        self.writer()
        return Reply(200, {"type": "user", "name": "user", "orgs": [{"name": "org"}], "auth": {"type": "access_token"}})

    def create(self):
        self.writer()
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or 'user'}/{asked['name']}"
        url = f"{self.server_state.url}/{name}"
        if name in self.server_state.repos:
            raise error(409, "Conflict", "You already created this model repo", url=url, name=name, id=name)
        files = {".gitattributes": b"*.safetensors filter=lfs\n"}
        private = bool(asked.get("private")) or asked.get("visibility") == "private"
        self.server_state.create(name, files, private=private, sdk=asked.get("sdk"))
        return Reply(200, {"url": url, "name": name, "id": name})

    def validate_yaml(self):
        return Reply(200, {"errors": [], "warnings": []})

    def preupload(self, repo, revision):
        self.writer()
        self.find(repo, revision)
        files = json.loads(self.body)["files"]
        big = (".safetensors", ".png", ".bin")
        modes = [
            {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(big) else "regular",
             "shouldIgnore": False, "oid": None}
            for file in files
        ]  # fmt: skip
        return Reply(200, {"files": modes, "commitOid": self.server_state.repos[repo].refs.get("main")})

    def lfs_batch(self, repo):
        self.writer()
        self.find(repo)
        objects = []
        for asked in json.loads(self.body)["objects"]:
            oid = asked["oid"]
            url = self.server_state.url
            actions = {"upload": {"href": f"{url}/lfs/{oid}"}, "verify": {"href": f"{url}/lfs/{oid}/verify"}}
            have = oid in self.server_state.objects
            objects.append({"oid": oid, "size": asked["size"], **({} if have else {"actions": actions})})
        return Reply(200, {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"})

    def lfs_put(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise error(400, "BadRequest", "the object is not what its hash says")
        self.server_state.objects[oid] = self.body
        return Reply(200)

    def lfs_verify(self, oid):
        return Reply(200 if oid in self.server_state.objects else 404, {})

    def commit(self, repo, revision):
        self.writer()
        found, parent = self.find(repo, revision)
        lines = [json.loads(line) for line in self.body.splitlines() if line.strip()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit") not in (None, parent["sha"]):
            raise error(412, "PreconditionFailed", "A commit has happened since. Please refresh and try again.")
        files = dict(parent["files"])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.server_state.objects:
                    raise error(400, "BadRequest", f"the object of {value['path']} was not uploaded")
                files[value["path"]] = self.server_state.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                if value["path"] not in files:
                    raise error(400, "BadRequest", f"{value['path']} is not there to be deleted")
                del files[value["path"]]
        answer = {"success": True}
        branch = unquote(revision)
        if self.query.get("create_pr") == ["1"]:
            found.pulls += 1
            branch = f"refs/pr/{found.pulls}"
            found.refs[branch] = parent["sha"]
            answer["pullRequestUrl"] = f"{self.server_state.url}/{repo}/discussions/{found.pulls}"
        sha = found.add(branch, files, header["summary"], header.get("description") or "")
        return Reply(200, {**answer, "commitOid": sha, "commitUrl": f"{self.server_state.url}/{repo}/commit/{sha}"})

    def resolve(self, repo, revision, file):
        found, commit = self.find(repo, revision)
        if found.gated and not self.known:
            raise error(403, "GatedRepo", "Access to this model is restricted")
        if file not in commit["files"]:
            raise Reply(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit["sha"]})
        data = commit["files"][file]
        tag = hashlib.sha256(data).hexdigest()
        headers = {"X-Repo-Commit": commit["sha"], "ETag": f'"{tag}"', "Accept-Ranges": "bytes"}
        headers |= {"X-Linked-Etag": f'"{tag}"', "X-Linked-Size": str(len(data))}
        if self.command == "HEAD":
            return Reply(200, b"", {**headers, "Content-Length": str(len(data))})
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start, end = int(asked[1]), int(asked[2] or len(data) - 1)
            return Reply(206, data[start : end + 1], {**headers, "Content-Range": f"bytes {start}-{end}/{len(data)}"})
        return Reply(200, data, headers)

    def described(self, name, commit=None):
        repo = self.server_state.repos[name]
        commit = commit or repo.commit("main")
        files = commit["files"]
        card: dict[str, Any] = {}
        if front := re.match(rb"---\r?\n(.*?)\r?\n---", files.get("README.md", b""), flags=re.DOTALL):
            card = read_card(front[1])
        tags = [tag for tag in card.get("tags") or [] if isinstance(tag, str)]
        tags += [card["library_name"]] if "library_name" in card else []
        bases = card.get("base_model") or []
        for base in [bases] if isinstance(bases, str) else bases:
            tags.append(f"base_model:{base}")
            if "base_model_relation" in card:
                tags.append(f"base_model:{card['base_model_relation']}:{base}")
        siblings = [
            {"rfilename": path, "size": len(data), "blobId": hashlib.sha1(data).hexdigest()}
            for path, data in files.items()
        ]
        return {
            "id": name, "modelId": name, "sha": commit["sha"], "lastModified": commit["date"], "tags": tags,
            "private": repo.private, "gated": repo.gated, "likes": repo.likes, "downloads": 0, "cardData": card,
            "siblings": siblings, "author": name.split("/")[0], "disabled": False,
        }  # fmt: skip

    def info(self, repo, revision="main"):
        _, commit = self.find(repo, revision)
        return Reply(200, self.described(repo, commit))

    def models(self):
        wanted = set(self.query.get("filter", []))
        search, author = (self.query.get(name, [""])[0] for name in ("search", "author"))
        found = [
            model
            for name, repo in self.server_state.repos.items()
            if (not repo.private or self.known) and search.lower() in name.lower() and name.startswith(author)
            and wanted <= set((model := self.described(name))["tags"])
        ]  # fmt: skip
        if self.query.get("sort") == ["lastModified"]:
            found.sort(key=lambda model: model["lastModified"], reverse=True)
        start = int(self.query.get("cursor", ["0"])[0])
        size = min(PAGE, int(self.query.get("limit", [str(PAGE)])[0]))
        headers = {}
        if start + size < len(found):
            query = urlencode({**self.query, "cursor": start + size}, doseq=True)
            headers["Link"] = f'<{self.server_state.url}/api/models?{query}>; rel="next"'
        return Reply(200, found[start : start + size], headers)

    def tree(self, repo, revision, folder=None):
        _, commit = self.find(repo, revision)
        entries = [
            {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for path, data in commit["files"].items()
            if path.startswith((folder or "").lstrip("/"))
        ]
        return Reply(200, entries)

    def branch(self, repo, branch):
        self.writer()
        found, _ = self.find(repo)
        branch = unquote(branch)
        if branch in found.refs:
            raise error(409, "Conflict", "Reference already exists")
        found.refs[branch] = found.refs["main"]
        return Reply(200, {})

    def tag(self, repo, revision):
        self.writer()
        found, commit = self.find(repo, revision)
        name = json.loads(self.body)["tag"]
        if name in found.tags:
            raise error(409, "Conflict", "Tag already exists")
        found.tags[name] = commit["sha"]
        return Reply(200, {})

    def commits(self, repo, revision):
        found, commit = self.find(repo, revision)
        history, by_sha = [], {entry["sha"]: entry for entry in found.commits}
        while commit:
            history.append(
                {"id": commit["sha"], "title": commit["title"], "message": commit["message"], "authors": [],
                 "date": commit["date"]}
            )  # fmt: skip
            commit = by_sha.get(commit["parent"])
        return Reply(200, history)


_CODES = {401: "Unauthorized", 403: "GatedRepo", 404: "RepoNotFound", 409: "Conflict", 412: "PreconditionFailed"}
_ROUTES = [
    ("GET", "/api/whoami-v2", "whoami"),
    ("POST", "/api/repos/create", "create"),
    ("POST", "/api/validate-yaml", "validate_yaml"),
    ("GET", "/api/models", "models"),
    ("POST", f"/api/models/{REPO}/preupload/(?P<revision>.+)", "preupload"),
    ("POST", f"/{REPO}.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/lfs/(?P<oid>\w+)", "lfs_put"),
    ("POST", r"/lfs/(?P<oid>\w+)/verify", "lfs_verify"),
    ("POST", f"/api/models/{REPO}/commit/(?P<revision>.+)", "commit"),
    ("POST", f"/api/models/{REPO}/branch/(?P<branch>.+)", "branch"),
    ("POST", f"/api/models/{REPO}/tag/(?P<revision>.+)", "tag"),
    ("GET", f"/api/models/{REPO}", "info"),
    ("GET", f"/api/models/{REPO}/revision/(?P<revision>.+)", "info"),
    ("GET", rf"/api/models/{REPO}/tree/(?P<revision>refs/pr/\d+|[^/]+)(?P<folder>/.*)?", "tree"),
    ("GET", f"/api/models/{REPO}/commits/(?P<revision>.+)", "commits"),
    ("GET", rf"/{REPO}/resolve/(?P<revision>refs/pr/\d+|[^/]+)/(?P<file>.+)", "resolve"),
    ("HEAD", rf"/{REPO}/resolve/(?P<revision>refs/pr/\d+|[^/]+)/(?P<file>.+)", "resolve"),
]
