"""A Hugging Face hub on this machine: the HTTP API that huggingface_hub speaks, over folders in memory.

It knows what pushing and fetching a model takes: repositories and their visibility, upload modes, LFS objects (each
stored once), commits, trees, files with ETag and Range. It is stricter than the hub: what it does not know is an error
500 with the request in it, an LFS object whose digest is wrong is refused, and so is a commit of an object that nobody
uploaded. Every request is kept in `requests`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_token_of_the_tests"
_LFS = re.compile(r".*\.(safetensors|onnx|onnx_data|plan|bin|xml)")


@dataclass(frozen=True)
class File:
    data: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def blob(self) -> str:
        """The id that git gives to what it stores: the file, or the pointer to it."""
        text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n"
        held = text.encode() if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(held) + held).hexdigest()


@dataclass
class Repo:
    private: bool = False
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, File], branch: str = "main") -> str:
        name = hashlib.sha1(repr((len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits[name] = files
        self.branches[branch] = name
        return name

    def files(self, revision: str = "main") -> dict[str, File]:
        return self.commits[self.branches.get(revision, revision)]


class Hub:
    """A hub that listens.

    Attributes:
        repos: by name.
        objects: LFS objects by sha256.
        uploads: bytes that came as LFS objects.
        requests: (method, path, value of the header Range).
        cut: path in a repository -> bytes after which the connection breaks, once.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.uploads = 0
        self.requests: list[tuple[str, str, str | None]] = []
        self.cut: dict[str, int] = {}
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def downloaded(self) -> list[str]:
        """Files that were asked for, each as often as it was."""
        return [path.split("/", 5)[5] for method, path, _ in self.requests if method == "GET" and "/resolve/" in path]

    def change(self, repo: str, path: str, data: bytes) -> None:
        """Another file in the place of one, without a new commit: what a thief of an account might do, or a disk."""
        found = self.repos[repo]
        files = found.files()
        files[path] = File(data, files[path].lfs)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, status: int, body: Any = None, **headers: Any) -> None:
        data = body if isinstance(body, bytes) else json.dumps({} if body is None else body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(data), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            found = b""
            while size := int(self.rfile.readline(), 16):
                found += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return found
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _route(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        try:
            for method, pattern, handle in _ROUTES:
                if self.command in method.split("|") and (found := re.fullmatch(pattern, path)):
                    if self.command in ("POST", "PUT") and not self._knows_me():
                        self._answer(401, {"error": "Unauthorized"})
                    else:
                        handle(self, *found.groups())
                    return
            self._answer(500, {"error": f"the fake hub does not know {self.command} {path}"})
        except BrokenPipeError:
            pass

    do_GET = do_HEAD = do_POST = do_PUT = _route

    def _knows_me(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}" or "/upload/" in self.path

    def _repo(self, name: str) -> Repo | None:
        found = self.hub.repos.get(name)
        if found is None or (found.private and not self._knows_me()):
            self._answer(401, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            return None
        return found

    def _files(self, name: str, revision: str) -> tuple[str, dict[str, File]] | None:
        if (found := self._repo(name)) is None:
            return None
        commit = found.branches.get(revision, revision)
        if commit not in found.commits:
            self._answer(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")
            return None
        return commit, found.commits[commit]

    # fetching

    def resolve(self, repo: str, revision: str, path: str) -> None:
        if (found := self._files(repo, revision)) is None:
            return
        commit, files = found
        if path not in files:
            self._answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            return
        file = files[path]
        headers: dict[str, Any] = {"X_Repo_Commit": commit, "Accept_Ranges": "bytes", "ETag": f'"{file.blob}"'}
        if file.lfs:
            headers |= {"X_Linked_Etag": f'"{file.sha256}"', "X_Linked_Size": len(file.data)}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        start = int(asked[1]) if asked else 0
        data = file.data[start : int(asked[2]) + 1 if asked and asked[2] else None]
        if asked:
            headers["Content_Range"] = f"bytes {start}-{start + len(data) - 1}/{len(file.data)}"
        if self.command == "GET" and (after := self.hub.cut.pop(path, None)) is not None:
            self.send_response(206 if asked else 200)
            for name, value in {"Content-Length": len(data), **headers}.items():
                self.send_header(name.replace("_", "-"), str(value))
            self.end_headers()
            self.wfile.write(data[:after])
            self.wfile.flush()
            self.close_connection = True
            return
        self._answer(206 if asked else 200, data, **headers)

    def info(self, repo: str, revision: str | None) -> None:
        if found := self._files(repo, revision or "main"):
            commit, files = found
            body = {"id": repo, "sha": commit, "private": self.hub.repos[repo].private, "tags": [], "downloads": 0}
            self._answer(200, body | {"siblings": [{"rfilename": name} for name in files]})

    def tree(self, repo: str, revision: str) -> None:
        if found := self._files(repo, revision):
            rows = []
            for path, file in found[1].items():
                row: dict[str, Any] = {"type": "file", "path": path, "size": len(file.data), "oid": file.blob}
                if file.lfs:
                    row["lfs"] = {"oid": file.sha256, "size": len(file.data), "pointerSize": 130}
                rows.append(row)
            self._answer(200, rows)

    # pushing

    def create(self) -> None:
        body = json.loads(self._body())
        name = f"{body.get('organization') or 'user'}/{body['name']}"
        if name in self.hub.repos:
            self._answer(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"})
            return
        private = body.get("private") or body.get("visibility") == "private"
        made = self.hub.repos[name] = Repo(bool(private))
        made.commit({".gitattributes": File(b"*.safetensors filter=lfs\n", False)})
        self._answer(200, {"url": f"{self.hub.url}/{name}", "id": name, "name": name})

    def yaml(self) -> None:
        import yaml

        content = json.loads(self._body())["content"]
        found = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        parsed = yaml.safe_load(found[1]) if found else None
        wrong = [] if isinstance(parsed, dict) and "license" in parsed else [{"message": "no license"}]
        self._answer(400 if wrong else 200, {"errors": wrong, "warnings": []})

    def preupload(self, repo: str, revision: str) -> None:
        asked = json.loads(self._body())["files"]
        if found := self._files(repo, revision):
            files = []
            for file in asked:
                lfs = bool(_LFS.fullmatch(file["path"]))
                now = found[1].get(file["path"])
                row = {"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
                files.append(row | ({"oid": now.sha256 if now.lfs else now.blob} if now else {}))
            self._answer(200, {"files": files})

    def batch(self, repo: str) -> None:
        asked = json.loads(self._body())
        assert asked["operation"] == "upload" and "basic" in asked["transfers"], asked
        if self._repo(repo):
            rows = []
            for entry in asked["objects"]:
                action = {"upload": {"href": f"{self.hub.url}/upload/{entry['oid']}"}}
                rows.append(entry if entry["oid"] in self.hub.objects else entry | {"actions": action})
            self._answer(200, {"transfer": "basic", "objects": rows})

    def upload(self, oid: str) -> None:
        data = self._body()
        if hashlib.sha256(data).hexdigest() != oid:
            self._answer(400, {"error": "the digest is another one"})
            return
        self.hub.objects[oid] = data
        self.hub.uploads += len(data)
        self._answer(200)

    def commit(self, repo: str, revision: str) -> None:
        rows = [json.loads(line) for line in self._body().splitlines()]
        if (found := self._files(repo, revision)) is None:
            return
        files = dict(found[1])
        for row in rows:
            kind, value = row["key"], row["value"]
            if kind == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), False)
            elif kind == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    self._answer(400, {"error": f"no object {value['oid']} was uploaded"})
                    return
                files[value["path"]] = File(self.hub.objects[value["oid"]], True)
            elif kind == "deletedFile":
                del files[value["path"]]
            elif kind != "header":
                self._answer(500, {"error": f"the fake hub does not know {kind}"})
                return
        made = self.hub.repos[repo].commit(files, revision)
        body = {"success": True, "commitOid": made, "commitUrl": f"{self.hub.url}/{repo}/commit/{made}"}
        self._answer(200, body | {"hookOutput": ""})

    def branch(self, repo: str, name: str) -> None:
        self._body()
        if found := self._repo(repo):
            if name in found.branches:
                self._answer(409, {"error": "Reference already exists"})
            else:
                found.branches[name] = found.branches["main"]
                self._answer(200)


_NAME = r"([\w.-]+/[\w.-]+)"
_ROUTES = [
    ("GET|HEAD", rf"/{_NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
    ("GET", rf"/api/models/{_NAME}(?:/revision/(.+))?", _Handler.info),
    ("GET", rf"/api/models/{_NAME}/tree/([^/]+)/?", _Handler.tree),
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", r"/api/validate-yaml", _Handler.yaml),
    ("POST", rf"/api/models/{_NAME}/preupload/(.+)", _Handler.preupload),
    ("POST", rf"/api/models/{_NAME}/branch/(.+)", _Handler.branch),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", r"/upload/([0-9a-f]{64})", _Handler.upload),
    ("POST", rf"/api/models/{_NAME}/commit/(.+)", _Handler.commit),
]
