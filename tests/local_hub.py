"""A small Hugging Face Hub on the loopback, for the real `huggingface_hub` client to talk to.

It keeps models and data sets in memory and in a folder, checks tokens, and can be told to fail. The calls it answers
are those that pushing, pulling and `datasets.load_dataset` make on huggingface_hub 0.36 and 2.x.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

_DATE = "2026-01-01T00:00:00.000Z"
_LARGE = (".safetensors", ".onnx", ".parquet", ".bin", ".model")
_REVISION = r"/(?P<revision>[^/]+)"
_API = r"/api/(?P<kind>models|datasets)/(?P<repo>[\w.-]+/[\w.-]+)"
_PAGE = r"/(?P<kind>datasets/)?(?P<repo>[\w.-]+/[\w.-]+)"


@dataclass(frozen=True)
class User:
    """Who a token belongs to, and whether it may write."""

    name: str
    writes: bool = True


@dataclass
class Repository:
    """The commits of a repository, as path -> (sha256, whether it is in LFS), and what points at them."""

    private: bool
    commits: dict[str, dict[str, tuple[str, bool]]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, tuple[str, bool]], message: str) -> str:
        oid = hashlib.sha1(f"{len(self.commits)} {sorted(files.items())} {message}".encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        self.messages.append(message)
        return oid

    def resolve(self, revision: str) -> str | None:
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        return oid if oid in self.commits else None


@dataclass
class Fault:
    """What goes wrong with the next requests of a kind: an answer, or a connection that is dropped."""

    method: str
    path: str
    status: int | None
    times: int
    message: str
    code: str | None


class LocalHub(ThreadingHTTPServer):
    """The server. `with LocalHub(folder).running() as hub:` starts it at `hub.endpoint`.

    Attributes:
        tokens: Who a token belongs to.
        requests: Method, path and status of every answer.
        repositories: By kind and name, such as `models/alice/net`.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.tokens = {"hf_alice": User("alice"), "hf_reader": User("alice", writes=False), "hf_bob": User("bob")}
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str, int]] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @contextmanager
    def running(self) -> Iterator[LocalHub]:
        thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield self
        finally:
            self.shutdown()
            thread.join()
            self.server_close()

    def fail(
        self,
        method: str,
        path: str,
        status: int | None,
        *,
        times: int = 1,
        message: str = "",
        code: str | None = None,
    ) -> None:
        """Let the next requests whose path matches fail; `status=None` drops the connection in mid-body.

        Of an upload that is the body of the request, of a download that of the answer.
        """
        self.faults.append(Fault(method, path, status, times, message, code))

    def plant(self, repo: str, files: Mapping[str, bytes], *, private: bool = False, branch: str = "main") -> str:
        """Put files into a repository, new or not, without the client and its checks."""
        repository = self.repositories.setdefault(repo, Repository(private))
        held = dict(repository.commits.get(repository.branches.get(branch, ""), {}))
        held.update({path: (self.store(content), path.endswith(_LARGE)) for path, content in files.items()})
        return repository.commit(branch, held, "planted")

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """The content of a repository."""
        repository = self.repositories[repo]
        held = repository.commits[repository.resolve(revision) or ""]
        return {path: self.load(sha) for path, (sha, _) in held.items() if path != ".gitattributes"}

    def store(self, content: bytes) -> str:
        sha = hashlib.sha256(content).hexdigest()
        (self.folder / sha).write_bytes(content)
        return sha

    def load(self, sha: str) -> bytes:
        return (self.folder / sha).read_bytes()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that went away."""


class _Refusal(Exception):
    def __init__(self, status: int, message: str, code: str | None = None, **body: Any) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.body = {"error": message, **body}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: LocalHub

    def log_message(self, *_: Any) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        self._answer("GET")

    def do_HEAD(self) -> None:
        self._answer("HEAD")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PUT(self) -> None:
        self._answer("PUT")

    def _answer(self, method: str) -> None:
        url = urlsplit(self.path)
        self.url_path, self.query = url.path, parse_qs(url.query)
        fault = self._next_fault(method)
        self.breaks_off = fault is not None and fault.status is None
        if self.breaks_off and method != "GET":
            self.rfile.read(min(1000, int(self.headers.get("Content-Length", 0))))
            self.close_connection = True
            self.server.requests.append((method, url.path, 0))
            return
        self.body = self._read_body()
        try:
            if fault is not None and fault.status is not None:
                raise _Refusal(fault.status, fault.message, fault.code)
            for verb, pattern, handler in _ROUTES:
                found = re.fullmatch(pattern, url.path)
                if found and method in verb:
                    with self.server.lock:
                        handler(self, **{k: unquote(v) if v else v for k, v in found.groupdict().items()})
                    return
            raise _Refusal(404, f"No such call: {method} {url.path}", "EntryNotFound")
        except _Refusal as refusal:
            headers = {"X-Error-Message": str(refusal)}
            if refusal.code:
                headers["X-Error-Code"] = refusal.code
            self._send_json(refusal.body, refusal.status, headers)

    def _next_fault(self, method: str) -> Fault | None:
        with self.server.lock:
            for fault in self.server.faults:
                if fault.times and fault.method == method and re.search(fault.path, self.url_path):
                    fault.times -= 1
                    return fault
        return None

    def _read_body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _send(self, content: bytes, status: int, headers: Mapping[str, str]) -> None:
        self.server.requests.append((self.command, self.url_path, status))
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.breaks_off:
            content, self.close_connection = content[: len(content) * 3 // 4], True
        if self.command != "HEAD":
            self.wfile.write(content)

    def _send_json(self, value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    # Who asks, and what for

    def _user(self) -> User | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        if not token:
            return None
        if token not in self.server.tokens:
            raise _Refusal(401, "Invalid credentials in Authorization header")
        return self.server.tokens[token]

    def _repository(self, kind: str | None, repo: str, *, write: bool = False) -> Repository:
        user, name = self._user(), f"{(kind or 'models').rstrip('/')}/{repo}"
        found = self.server.repositories.get(name)
        owns = user is not None and repo.startswith(f"{user.name}/")
        if found is None or (found.private and not owns):
            raise _Refusal(401 if user is None else 404, "Repository not found", "RepoNotFound")
        if write and (user is None or not owns or not user.writes):
            raise _Refusal(401 if user is None else 403, "You don't have the rights to write to this repository")
        return found

    def _commit_of(self, repository: Repository, revision: str) -> str:
        oid = repository.resolve(revision)
        if oid is None:
            raise _Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid

    # The calls

    def whoami(self) -> None:
        user = self._user()
        if user is None:
            raise _Refusal(401, "Invalid username or password.")
        self._send_json({"type": "user", "name": user.name, "orgs": [], "auth": {"type": "access_token"}})

    def create(self) -> None:
        asked, user = json.loads(self.body), self._user()
        if user is None:
            raise _Refusal(401, "Invalid username or password.")
        owner = asked.get("organization") or user.name
        if not user.writes or owner != user.name:
            raise _Refusal(403, f"You don't have the rights to create a model under the namespace {owner}")
        kind = f"{asked.get('type') or 'model'}s"
        name = f"{kind}/{owner}/{asked['name']}"
        url = f"{self.server.endpoint}/{name.removeprefix('models/')}"
        if name in self.server.repositories:
            raise _Refusal(409, "You already created this repo", url=url)
        repository = Repository(private=bool(asked.get("private") or asked.get("visibility") == "private"))
        repository.commit("main", {".gitattributes": (self.server.store(b"*.safetensors lfs\n"), False)}, "initial")
        self.server.repositories[name] = repository
        self._send_json({"url": url, "id": f"{owner}/{asked['name']}", "name": f"{owner}/{asked['name']}"})

    def validate_yaml(self) -> None:
        asked = json.loads(self.body)
        problems = _card_problems(asked["content"])
        if problems:
            raise _Refusal(400, "Invalid metadata", errors=[{"message": p} for p in problems], warnings=[])
        self._send_json({"errors": [], "warnings": []})

    def preupload(self, kind: str, repo: str, revision: str) -> None:
        repository = self._repository(kind, repo, write=True)
        held = repository.commits[self._commit_of(repository, revision)]
        answers = []
        for file in json.loads(self.body)["files"]:
            large = file["path"].endswith(_LARGE) or file["size"] > 10 * 2**20
            known = held.get(file["path"])
            answers.append(
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if large else "regular",
                    "shouldIgnore": False,
                    "oid": None if known is None else self._oid(*known),
                }
            )
        self._send_json({"files": answers})

    def lfs_batch(self, kind: str | None, repo: str) -> None:
        self._repository(kind, repo, write=True)
        objects = []
        for item in json.loads(self.body)["objects"]:
            answer = dict(item)
            if not (self.server.folder / item["oid"]).is_file():
                base = self.server.endpoint
                answer["actions"] = {
                    "upload": {"href": f"{base}/lfs/{item['oid']}"},
                    "verify": {"href": f"{base}/lfs/verify"},
                }
            objects.append(answer)
        self._send_json({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _Refusal(400, "The content is not what was announced")
        self.server.store(self.body)
        self._send(b"", 200, {})

    def lfs_verify(self) -> None:
        asked = json.loads(self.body)
        if not (self.server.folder / asked["oid"]).is_file():
            raise _Refusal(404, "Not uploaded")
        self._send_json({})

    def commit(self, kind: str, repo: str, revision: str) -> None:
        repository = self._repository(kind, repo, write=True)
        parent = self._commit_of(repository, revision)
        if revision not in repository.branches:
            raise _Refusal(400, f"{revision} is not a branch")
        files = dict(repository.commits[parent])
        message = ""
        for line in self.body.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                message = value["summary"]
                if value.get("parentCommit", parent) != parent:
                    raise _Refusal(412, "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                files[value["path"]] = (self.server.store(base64.b64decode(value["content"])), False)
            elif key == "lfsFile":
                if not (self.server.folder / value["oid"]).is_file():
                    raise _Refusal(400, "Your push was rejected because an LFS pointer pointed to a missing file")
                files[value["path"]] = (value["oid"], True)
            elif key == "deletedFile":
                if files.pop(value["path"], None) is None:
                    raise _Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
            elif key == "deletedFolder":
                files = {p: f for p, f in files.items() if not p.startswith(value["path"].rstrip("/") + "/")}
            else:
                raise _Refusal(400, f"Unknown key {key}")
        readme = files.get("README.md")
        problems = _card_problems(self.server.load(readme[0]).decode()) if readme else []
        if problems:
            raise _Refusal(400, "; ".join(problems))
        oid = repository.commit(revision, files, message)
        prefix = "" if kind == "models" else "datasets/"
        url = f"{self.server.endpoint}/{prefix}{repo}/commit/{oid}"
        self._send_json({"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})

    def branch(self, kind: str, repo: str, revision: str) -> None:
        repository = self._repository(kind, repo, write=True)
        if revision in repository.branches:
            raise _Refusal(409, "Reference already exists")
        start = json.loads(self.body or b"{}").get("startingPoint") or "main"
        repository.branches[revision] = self._commit_of(repository, start)
        self._send_json({})

    def tag(self, kind: str, repo: str, revision: str) -> None:
        repository, name = self._repository(kind, repo, write=True), json.loads(self.body)["tag"]
        if name in repository.tags:
            raise _Refusal(409, "Tag reference exists already")
        repository.tags[name] = self._commit_of(repository, revision)
        self._send_json({})

    def refs(self, kind: str, repo: str) -> None:
        repository = self._repository(kind, repo)

        def listed(refs: Mapping[str, str], folder: str) -> list[dict[str, str]]:
            return [{"name": n, "ref": f"refs/{folder}/{n}", "targetCommit": oid} for n, oid in refs.items()]

        self._send_json(
            {"branches": listed(repository.branches, "heads"), "converts": [], "tags": listed(repository.tags, "tags")}
        )

    def info(self, kind: str, repo: str, revision: str | None = None) -> None:
        repository = self._repository(kind, repo)
        oid = self._commit_of(repository, revision or "main")
        files = repository.commits[oid]
        readme = files.get("README.md")
        card = _front_matter(self.server.load(readme[0]).decode()) if readme else {}
        self._send_json(
            {
                "_id": "1",
                "id": repo,
                "modelId": repo,
                "author": repo.partition("/")[0],
                "sha": oid,
                "private": repository.private,
                "gated": False,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "lastModified": _DATE,
                "createdAt": _DATE,
                "tags": card.get("tags", []),
                "pipeline_tag": card.get("pipeline_tag"),
                "library_name": card.get("library_name"),
                "model-index": card.get("model-index"),
                "cardData": card,
                "siblings": [{"rfilename": path} for path in files],
            }
        )

    def tree(self, kind: str, repo: str, revision: str, path: str | None = None) -> None:
        repository = self._repository(kind, repo)
        files = repository.commits[self._commit_of(repository, revision)]
        folder = f"{path.strip('/')}/" if path and path.strip("/") else ""
        recursive = self.query.get("recursive", ["false"])[0].lower() == "true"
        entries: dict[str, dict[str, Any]] = {}
        for name in sorted(files):
            if not name.startswith(folder):
                continue
            parts = name.removeprefix(folder).split("/")
            for depth in range(1, len(parts)):
                parent = folder + "/".join(parts[:depth])
                if recursive or depth == 1:
                    entries[parent] = {"type": "directory", "path": parent, "oid": "0" * 40, "size": 0}
            if recursive or len(parts) == 1:
                entries[name] = self._file_entry(name, files)
        if folder and not entries:
            raise _Refusal(404, f"{path} does not exist", "EntryNotFound")
        self._send_json(list(entries.values()))

    def paths_info(self, kind: str, repo: str, revision: str) -> None:
        repository = self._repository(kind, repo)
        files = repository.commits[self._commit_of(repository, revision)]
        is_json = "json" in self.headers.get("Content-Type", "")
        asked = json.loads(self.body)["paths"] if is_json else parse_qs(self.body.decode()).get("paths", [])
        entries = []
        for path in asked:
            if path in files:
                entries.append(self._file_entry(path, files))
            elif any(name.startswith(f"{path}/") for name in files):
                entries.append({"type": "directory", "path": path, "oid": "0" * 40, "size": 0})
        self._send_json(entries)

    def resolve(self, kind: str | None, repo: str, revision: str, path: str) -> None:
        repository = self._repository(kind, repo)
        oid = self._commit_of(repository, revision)
        headers = {"X-Repo-Commit": oid, "Accept-Ranges": "bytes"}
        if path not in repository.commits[oid]:
            raise _Refusal(404, f"{path} does not exist", "EntryNotFound")
        sha, large = repository.commits[oid][path]
        content, status = self.server.load(sha), 200
        headers["ETag"] = f'"{self._oid(sha, large)}"'
        if large:
            headers.update({"X-Linked-Etag": f'"{sha}"', "X-Linked-Size": str(len(content))})
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked:
            start, size = int(asked[1]), len(content)
            stop = min(int(asked[2]) + 1, size) if asked[2] else size
            content, status = content[start:stop], 206
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        self._send(content, status, headers)

    def _oid(self, sha: str, large: bool) -> str:
        """The sha256 of a large file, the name that git gives to another."""
        content = b"" if large else self.server.load(sha)
        return sha if large else hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()

    def _file_entry(self, path: str, files: Mapping[str, tuple[str, bool]]) -> dict[str, Any]:
        sha, large = files[path]
        size = len(self.server.load(sha))
        entry: dict[str, Any] = {"type": "file", "path": path, "size": size, "oid": self._oid(sha, large)}
        if large:
            entry["lfs"] = {"oid": sha, "size": size, "pointerSize": 130}
        return entry


def _front_matter(text: str) -> dict[str, Any]:
    found = re.match(r"\s*---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    return (yaml.safe_load(found[1]) if found else None) or {}


def _card_problems(text: str) -> list[str]:
    """What the Hub would reject in the metadata of a card."""
    try:
        card = _front_matter(text)
    except yaml.YAMLError as error:
        return [f"YAML: {error}"]
    problems = []
    for name in ("tags", "datasets", "task_categories"):
        value = card.get(name, [])
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            problems.append(f'"{name}" must be an array of strings')
    for name in ("license", "pipeline_tag", "library_name"):
        if name in card and not isinstance(card[name], str):
            problems.append(f'"{name}" must be a string')
    for dataset in card.get("datasets", []):
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(dataset)):
            problems.append(f'"datasets" holds {dataset!r}, which is no repository')
    for entry in card.get("model-index", []):
        if not isinstance(entry.get("name"), str):
            problems.append('"model-index[0].name" is required')
        for result in entry.get("results", []):
            for path in (("task", "type"), ("dataset", "type"), ("dataset", "name")):
                if not isinstance(result.get(path[0], {}).get(path[1]), str):
                    problems.append(f'"model-index[0].results[0].{".".join(path)}" is required')
            if not all("value" in m and isinstance(m.get("type"), str) for m in result.get("metrics", [{}])):
                problems.append('"model-index[0].results[0].metrics" need type and value')
    return problems


_ROUTES: list[tuple[tuple[str, ...], str, Any]] = [
    (("GET",), "/api/whoami-v2", _Handler.whoami),
    (("POST",), "/api/repos/create", _Handler.create),
    (("POST",), "/api/validate-yaml", _Handler.validate_yaml),
    (("POST",), _API + "/preupload" + _REVISION, _Handler.preupload),
    (("POST",), _API + "/commit" + _REVISION, _Handler.commit),
    (("POST",), _API + "/branch" + _REVISION, _Handler.branch),
    (("POST",), _API + "/tag" + _REVISION, _Handler.tag),
    (("GET",), _API + "/refs", _Handler.refs),
    (("GET",), _API + "/tree" + _REVISION + "(?P<path>/.*)?", _Handler.tree),
    (("POST",), _API + "/paths-info" + _REVISION, _Handler.paths_info),
    (("GET",), _API + "(?:/revision" + _REVISION + ")?", _Handler.info),
    (("POST",), "/lfs/verify", _Handler.lfs_verify),
    (("PUT",), "/lfs/(?P<oid>[0-9a-f]{64})", _Handler.lfs_put),
    (("POST",), _PAGE + r"\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    (("GET", "HEAD"), _PAGE + "/resolve" + _REVISION + "/(?P<path>.+)", _Handler.resolve),
]
