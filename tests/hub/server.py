"""
A stand-in for the Hugging Face Hub: enough of its routes for pushing to and loading from it, on loopback, in memory.

    python -m tests.hub.server

It prints its address and serves until it is killed. `HF_ENDPOINT` names it to the libraries; `running.py` does that.
"""

import base64
import hashlib
import json
import re
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

USERS = {"hf_someone": "someone", "hf_another": "another"}  # by token
LARGE = (".safetensors", ".bin", ".model", ".pt")  # kept by their sha256, as the Hub does


@dataclass
class Repository:
    """Files of each commit, and the commit of each branch and tag."""

    name: str
    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        self.commit("main", {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}, set())

    def commit(self, branch: str, added: dict[str, bytes], deleted: set[str]) -> str:
        """The name of the new commit on a branch."""
        files = self.commits.get(self.branches.get(branch, self.branches.get("main", "")), {})
        files = {path: content for path, content in files.items() if path not in deleted} | added
        name = hashlib.sha1(f"{self.name} {branch} {len(self.commits)}".encode()).hexdigest()
        self.commits[name], self.branches[branch] = files, name
        return name

    def resolve(self, revision: str) -> str | None:
        """The commit that a branch, a tag or a commit's own name means."""
        own = revision if revision in self.commits else None
        return self.branches.get(revision) or self.tags.get(revision) or own


class Hub:
    """What the server holds, and what tests ask of it."""

    def __init__(self):
        self.lock = threading.Lock()
        self.repositories: dict[str, Repository] = {}
        self.large_files: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.cuts: list[dict[str, Any]] = []  # `{"path": ..., "after": bytes, "times": n}`
        self.down = False

    def control(self, order: dict) -> Any:
        """Orders of `running.py`."""
        if "cut" in order:
            self.cuts.append(order["cut"])
        if order.get("mend"):
            self.cuts.clear()
        if "down" in order:
            self.down = order["down"]
        if order.get("requests"):
            seen, self.requests = self.requests, []
            return seen
        return None


def blob_id(content: bytes) -> str:
    """How git names a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def entry(path: str, content: bytes) -> dict:
    """A file as in listings."""
    about = {"type": "file", "path": path, "size": len(content), "oid": blob_id(content)}
    if path.endswith(LARGE):
        about["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return about


class Answer(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, code: str, message: str):
        super().__init__(message)
        self.status, self.headers = status, {"X-Error-Code": code, "X-Error-Message": message}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *arguments) -> None:
        pass

    # Requests --------------------------------------------------------------------------------------------------------

    def handle_one(self) -> None:
        url = urlsplit(self.path)
        path, self.query = unquote(url.path), parse_qs(url.query)
        length = int(self.headers.get("Content-Length") or 0)
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            self.body = b"".join(iter(self.read_chunk, b""))
        else:
            self.body = self.rfile.read(length)
        if path == "/control":
            with self.hub.lock:
                return self.send_json(self.hub.control(json.loads(self.body)))
        self.hub.requests.append(f"{self.command} {path}")
        if self.hub.down:
            return self.send_json({"error": "down"}, 503)
        try:
            for method, pattern, function in ROUTES:
                match = re.fullmatch(pattern, path)
                if match and self.command in method:
                    with self.hub.lock:
                        answer = function(self, **match.groupdict())
                    return answer() if callable(answer) else self.send_json(answer)
            raise Answer(404, "UnknownRoute", f"The stand-in has no route for {self.command} {path}")
        except Answer as error:
            self.send_json({"error": str(error)}, error.status, error.headers)
        except ConnectionError:  # the client is gone
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_one

    def read_chunk(self) -> bytes:
        content = self.rfile.read(int(self.rfile.readline(), 16))
        self.rfile.readline()
        return content

    def send_json(self, content: Any, status: int = 200, headers: dict | None = None) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": len(data),
            **(headers or {}),
        }.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # Who may do what -------------------------------------------------------------------------------------------------

    def user(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in USERS:
            raise Answer(401, "", "Invalid credentials in Authorization header")
        return USERS.get(token)

    def repository(self, name: str, writes: bool = False) -> Repository:
        user, repository = self.user(), self.hub.repositories.get(name)
        owns = user is not None and name.split("/")[0] == user
        if repository is None or (repository.private and not owns):
            raise Answer(404 if user else 401, "RepoNotFound", "Repository not found")
        if writes and not owns:
            raise Answer(403, "", "Forbidden: you must use a write token")
        return repository

    def files(self, name: str, revision: str) -> tuple[Repository, str, dict[str, bytes]]:
        repository = self.repository(name)
        commit = repository.resolve(revision)
        if commit is None:
            raise Answer(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repository, commit, repository.commits[commit]

    # Routes ----------------------------------------------------------------------------------------------------------

    def who(self):
        user = self.user()
        if user is None:
            raise Answer(401, "", "Unauthorized")
        return {"name": user, "type": "user", "auth": {"accessToken": {"role": "write"}}, "orgs": []}

    def create(self):
        order, user = json.loads(self.body), self.user()
        owner = order.get("organization") or user
        if user is None or owner != user:
            raise Answer(401 if user is None else 403, "", "You have no right to create a model under this namespace")
        name = f"{owner}/{order['name']}"
        answer = {"url": f"{self.server.address}/{name}", "name": name, "id": name}
        if name in self.hub.repositories:
            return lambda: self.send_json({"error": "You already created this model repo", **answer}, 409)
        is_private = order.get("visibility") == "private" or bool(order.get("private"))
        self.hub.repositories[name] = Repository(name, is_private)
        return answer

    def validate_yaml(self):
        return {"errors": [], "warnings": []}

    def preupload(self, name: str, revision: str):
        repository = self.repository(name, writes=True)
        held = repository.commits.get(repository.resolve(revision) or "", {})
        files = []
        for file in json.loads(self.body)["files"]:
            path = file["path"]
            known = held.get(path)
            mode = "lfs" if path.endswith(LARGE) else "regular"
            about = {"path": path, "uploadMode": mode, "shouldIgnore": False}
            if known is not None:
                is_large = path.endswith(LARGE)
                about["oid"] = hashlib.sha256(known).hexdigest() if is_large else blob_id(known)
            files.append(about)
        return {"files": files}

    def batch(self, name: str):
        self.repository(name, writes=True)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            about = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.large_files:
                about["actions"] = {"upload": {"href": f"{self.server.address}/large/{wanted['oid']}"}}
            objects.append(about)
        return {"transfer": "basic", "objects": objects}

    def put_large(self, oid: str):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Answer(400, "", "The content is not what was announced")
        self.hub.large_files[oid] = self.body
        return {}

    def commit(self, name: str, revision: str):
        repository = self.repository(name, writes=True)
        if repository.resolve(revision) is None:
            raise Answer(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        added, deleted = {}, set()
        for line in self.body.splitlines():
            step = json.loads(line)
            value = step["value"]
            if step["key"] == "file":
                added[value["path"]] = base64.b64decode(value["content"])
            elif step["key"] == "lfsFile":
                added[value["path"]] = self.hub.large_files[value["oid"]]
            elif step["key"] == "deletedFile":
                deleted.add(value["path"])
        commit = repository.commit(revision, added, deleted)
        return {
            "success": True,
            "commitOid": commit,
            "commitUrl": f"{self.server.address}/{name}/commit/{commit}",
            "pullRequestUrl": None,
        }

    def branch(self, name: str, branch: str):
        repository = self.repository(name, writes=True)
        if branch in repository.branches:
            raise Answer(409, "", "Reference already exists")
        start = json.loads(self.body or b"{}").get("startingPoint", "main")
        repository.branches[branch] = repository.resolve(start)
        return {}

    def tag(self, name: str, revision: str):
        repository = self.repository(name, writes=True)
        repository.tags[json.loads(self.body)["tag"]] = repository.resolve(revision)
        return {}

    def info(self, name: str, revision: str = "main"):
        repository, commit, files = self.files(name, revision)
        siblings = [{"rfilename": path, "size": len(content)} for path, content in files.items()]
        about = {"id": name, "modelId": name, "sha": commit, "private": repository.private, "siblings": siblings}
        return {**about, "tags": [], "gated": False, "disabled": False, "downloads": 0, "likes": 0}

    def refs(self, name: str):
        repository = self.repository(name)

        def listed(kind: str, names: dict[str, str]) -> list[dict]:
            return [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": c} for n, c in names.items()]

        return {
            "branches": listed("heads", repository.branches),
            "tags": listed("tags", repository.tags),
            "converts": [],
        }

    def tree(self, name: str, revision: str, folder: str | None):
        files = self.files(name, revision)[2]
        folder = f"{folder.strip('/')}/" if folder else ""
        inside = {path: content for path, content in files.items() if path.startswith(folder)}
        if folder and not inside:
            raise Answer(404, "EntryNotFound", f"There is no folder {folder}")
        listed, folders = [], set()
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        for path, content in inside.items():
            parents = path.removeprefix(folder).split("/")[:-1]
            folders |= {
                folder + "/".join(parents[:n]) for n in range(1, len(parents) + 1 if recursive else 2) if parents
            }
            if recursive or not parents:
                listed.append(entry(path, content))
        return [{"type": "directory", "path": path, "size": 0, "oid": ""} for path in sorted(folders)] + listed

    def paths(self, name: str, revision: str):
        files = self.files(name, revision)[2]
        try:
            wanted = json.loads(self.body)["paths"]
        except ValueError:
            wanted = parse_qs(self.body.decode()).get("paths", [])
        return [entry(path, files[path]) for path in wanted if path in files]

    def download(self, name: str, revision: str, path: str):
        _, commit, files = self.files(name, revision)
        if path not in files:
            raise Answer(404, "EntryNotFound", f"{path} does not exist on {revision!r}")
        content = files[path]
        tag = hashlib.sha256(content).hexdigest() if path.endswith(LARGE) else blob_id(content)
        headers = {"ETag": f'"{tag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        status, cut = 200, None
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if match:
            first, last = int(match[1]), int(match[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            content, status = content[first : last + 1], 206
        if self.command == "GET":
            cut = next((cut for cut in self.hub.cuts if path.endswith(cut["path"]) and cut["times"] > 0), None)
            if cut is not None:
                cut["times"] -= 1

        def send() -> None:
            self.send_response(status)
            for header, value in {**headers, "Content-Length": len(content)}.items():
                self.send_header(header, str(value))
            self.end_headers()
            if self.command == "HEAD":
                return
            self.wfile.write(content if cut is None else content[: cut["after"]])
            if cut is not None:  # the line goes dead in the middle of the file
                self.wfile.flush()
                self.close_connection = True

        return send


MODEL = r"/api/models/(?P<name>[^/]+/[^/]+)"
ROUTES = [
    ("GET", r"/api/whoami-v2", Handler.who),
    ("POST", r"/api/repos/create", Handler.create),
    ("POST", r"/api/validate-yaml", Handler.validate_yaml),
    ("POST", MODEL + r"/preupload/(?P<revision>.+)", Handler.preupload),
    ("POST", r"/(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", r"/large/(?P<oid>\w+)", Handler.put_large),
    ("POST", MODEL + r"/commit/(?P<revision>.+)", Handler.commit),
    ("POST", MODEL + r"/branch/(?P<branch>.+)", Handler.branch),
    ("POST", MODEL + r"/tag/(?P<revision>.+)", Handler.tag),
    ("GET", MODEL, Handler.info),
    ("GET", MODEL + r"/revision/(?P<revision>.+)", Handler.info),
    ("GET", MODEL + r"/refs", Handler.refs),
    ("GET", MODEL + r"/tree/(?P<revision>[^/]+)(?P<folder>/.*)?", Handler.tree),
    ("POST", MODEL + r"/paths-info/(?P<revision>.+)", Handler.paths),
    ("GET HEAD", r"/(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.download),
]


class Server(ThreadingHTTPServer):
    daemon_threads = True
    address = ""


def main() -> None:
    Handler.hub = Hub()
    server = Server(("127.0.0.1", 0), Handler)
    server.address = f"http://127.0.0.1:{server.server_address[1]}"
    print(server.address, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    sys.exit(main())
