"""A Hub of our own on 127.0.0.1: repositories in memory, by the requests that huggingface_hub makes."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_" + "LoopbackLoopbackLoopbackLoopback12"
_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass
class Repo:
    """`commits`: one mapping of all files a commit, the newest last."""

    private: bool
    commits: list[dict[str, bytes]] = field(default_factory=lambda: [{".gitattributes": b"*.bin filter=lfs\n"}])
    messages: list[str] = field(default_factory=lambda: ["initial commit"])

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1]

    @property
    def sha(self) -> str:
        return hashlib.sha1(repr((len(self.commits), sorted(self.files))).encode()).hexdigest()

    def put(self, **files: bytes) -> None:
        """A commit by somebody else; in the names "__" stands for a dot."""
        self.commits.append({**self.files, **{name.replace("__", "."): data for name, data in files.items()}})
        self.messages.append("by hand")


class LoopbackHub:
    """`repos`: by ("model" or "dataset", id). `who`: the answer to whoami. `drop`: the next commit is cut "before" or
    "after" it arrived. `refuse_card`: what the Hub holds against every card. `asked`: (method, path) of each
    request; `sent`: their bodies."""

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.who: dict[str, Any] = {
            "name": "me",
            "orgs": [{"name": "lab", "roleInOrg": "write"}, {"name": "library", "roleInOrg": "read"}],
            "auth": {"accessToken": {"displayName": "t", "role": "write"}},
        }
        self.drop: str | None = None
        self.refuse_card: str | None = None
        self.asked: list[tuple[str, str]] = []
        self.sent: list[bytes] = []
        self.url = ""

    def model(self, name: str) -> Repo:
        return self.repos["model", name]

    def dataset(self, name: str) -> Repo:
        return self.repos["dataset", name]


@contextmanager
def serving() -> Iterator[LoopbackHub]:
    hub = LoopbackHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Requests,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Cut(Exception):
    pass


class _Requests(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.handle_one("GET")

    def do_HEAD(self) -> None:
        self.handle_one("HEAD")

    def do_POST(self) -> None:
        self.handle_one("POST")

    def handle_one(self, method: str) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append((method, path))
        body = self.body() if method == "POST" else b""
        self.hub.sent.append(body)
        try:
            status, content, headers = self.answer(method, path, body)
        except _Cut:
            self.close_connection = True
            return
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if method != "HEAD":
            self.wfile.write(data)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    @property
    def known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        if path == "/api/whoami-v2":
            return (200, self.hub.who, {}) if self.known else (401, {"error": "Invalid user token."}, {})
        if path == "/api/validate-yaml":
            errors = self.card_faults(json.loads(body))
            return (400 if errors else 200), {"errors": [{"message": one} for one in errors], "warnings": []}, {}
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if found := re.fullmatch(r"/api/(model|dataset)s/([^/]+/[^/]+)(?:/(\w+)/([^/]+))?(?:/(.*))?", path):
            kind, name, what, _, _ = found.groups()
            repo = self.hub.repos.get((kind, name))
            if repo is None or (repo.private and not self.known):
                return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
            return self.of_repo(kind, name, repo, what, body)
        if found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            return self.file("dataset" if found[1] else "model", found[2], found[3])
        return 404, {"error": f"nothing at {path}"}, {}

    def card_faults(self, asked: dict[str, Any]) -> list[str]:
        """As the real one: ids must be ids."""
        if self.hub.refuse_card:
            return [self.hub.refuse_card]
        front = yaml.safe_load(asked["content"].split("---")[1]) or {}
        named = [("base_model", front.get("base_model")), *(("datasets", one) for one in front.get("datasets") or ())]
        return [f'"{key}" with value "{one}" is not valid' for key, one in named if one and not _ID.fullmatch(one)]

    def create(self, asked: dict[str, Any]) -> tuple[int, Any, dict[str, str]]:
        if not self.known:
            return 401, {"error": "Unauthorized"}, {}
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        key = (asked.get("type", "model"), name)
        url = f"{self.hub.url}/{'datasets/' if key[0] == 'dataset' else ''}{name}"
        if key in self.hub.repos:
            return 409, {"error": "You already created this repo", "url": url}, {}
        self.hub.repos[key] = Repo(asked.get("visibility") == "private" or bool(asked.get("private")))
        return 200, {"url": url, "id": name}, {}

    def of_repo(self, kind: str, name: str, repo: Repo, what: str | None, body: bytes) -> tuple[int, Any, dict]:
        if what == "preupload":
            files = [
                {"path": name, "uploadMode": "regular", "shouldIgnore": False, "oid": oid}
                for name in (one["path"] for one in json.loads(body)["files"])
                for oid in [_entry(name, repo.files[name])["oid"] if name in repo.files else None]
            ]
            return 200, {"files": files}, {}
        if what == "tree":
            return 200, [_entry(path, data) for path, data in sorted(repo.files.items())], {}
        if what == "commit":
            return self.commit(kind, name, repo, body)
        names = [{"rfilename": path} for path in repo.files]
        return 200, {"id": name, "sha": repo.sha, "private": repo.private, "siblings": names, "tags": []}, {}

    def commit(self, kind: str, name: str, repo: Repo, body: bytes) -> tuple[int, Any, dict]:
        drop, self.hub.drop = self.hub.drop, None
        if drop == "before":
            raise _Cut
        head, *operations = [json.loads(line) for line in body.splitlines()]
        parent = head["value"].get("parentCommit")
        if parent and parent != repo.sha:
            return 412, {"error": "A commit has happened since."}, {}
        files = dict(repo.files)
        for one in operations:
            files[one["value"]["path"]] = base64.b64decode(one["value"]["content"])
        repo.commits.append(files)
        repo.messages.append(head["value"]["summary"])
        if drop == "after":
            raise _Cut
        prefix = "datasets/" if kind == "dataset" else ""
        url = f"{self.hub.url}/{prefix}{name}/commit/{repo.sha}"
        return 200, {"success": True, "commitOid": repo.sha, "commitUrl": url}, {}

    def file(self, kind: str, name: str, path: str) -> tuple[int, Any, dict[str, str]]:
        repo = self.hub.repos.get((kind, name))
        if repo is None or (repo.private and not self.known):
            return 404, b"", {"X-Error-Code": "RepoNotFound"}
        if path not in repo.files:
            return 404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": repo.sha}
        data = repo.files[path]
        return 200, data, {"ETag": f'"{_entry(path, data)["oid"]}"', "X-Repo-Commit": repo.sha}


def _entry(path: str, data: bytes) -> dict[str, Any]:
    git = hashlib.sha1(b"blob %d\0" % len(data) + data)
    return {"type": "file", "path": path, "size": len(data), "oid": git.hexdigest()}
