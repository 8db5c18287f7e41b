"""A small Hugging Face Hub on the loopback: what of its protocol the unmodified client needs to push and to pull.

Repositories live in memory, a tree of files for each commit. Large files go the way of Git LFS: a batch request, an
upload that is checked against its SHA-256, a commit that names it, and downloads that redirect to another host. What
writes can fail in the ways of `FAILURES`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


TOKEN = "hf_token_of_the_tests"
USER = "me"
# how what writes can fail, and where: where the client does not ask again for half a minute
FAILURES = {
    "down": "/repos/create$|/commit/",  # 503
    "full": "/info/lfs/|^/lfs/",  # 403, as of an account without space left
    "closed": "/preupload/",  # 403
    "silent": "/repos/create$",  # no answer
    "stuck": "/commit/",  # no answer
}
LARGE = (".safetensors", ".parquet", ".png", ".pt", ".pth", ".bin")


@dataclass
class File:
    content: bytes
    large: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def blob(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def oid(self) -> str:
        return self.sha256 if self.large else self.blob


@dataclass
class Repository:
    kind: str  # "models" or "datasets"
    name: str
    private: bool
    commits: list[tuple[str, str]] = field(default_factory=list)  # oid and message, the newest last
    trees: dict[str, dict[str, File]] = field(default_factory=dict)

    def commit(self, message: str, tree: dict[str, File]) -> str:
        oid = hashlib.sha1(f"{self.kind}/{self.name} {len(self.commits)} {message}".encode()).hexdigest()
        self.commits.append((oid, message))
        self.trees[oid] = tree
        return oid

    @property
    def files(self) -> dict[str, File]:
        return self.trees[self.commits[-1][0]]


class Hub:
    """The server; `with Hub() as hub` starts it at `hub.url`."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.stored: dict[str, bytes] = {}  # large files by SHA-256
        self.requests: list[str] = []
        self.failure: str | None = None
        self.speaks = threading.Event()  # when a silent Hub says something again
        self.lock = threading.RLock()
        hub = self

        class BoundHandler(Handler):
            pass

        BoundHandler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), BoundHandler)
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.storage = f"http://localhost:{self.port}"  # another host to the client, as that of large files is

    def __enter__(self) -> Hub:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def files(self, name: str, kind: str = "models") -> dict[str, bytes]:
        return {path: file.content for path, file in self.repositories[kind, name].files.items()}

    def messages(self, name: str, kind: str = "models") -> list[str]:
        return [message for _, message in self.repositories[kind, name].commits]


def client_environment(hub: Hub, home: Path) -> dict[str, str]:
    """Variables of a process that knows this Hub only, and whose cache is in `home`."""
    dropped = ("HF_", "PYTHONPATH", "VIRTUAL_ENV")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    return environment | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home / "huggingface"),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",  # large files go by Git LFS, as to every Hub without Xet
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1,localhost",
        "OMP_NUM_THREADS": "1",
    }


class Refusal(Exception):
    def __init__(self, status: int, message: str, code: str = ""):
        super().__init__(message)
        self.status, self.code = status, code


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.handle_request()

    do_HEAD = do_POST = do_PUT = do_GET

    def handle_request(self) -> None:
        self.body = self.read_body()
        parts = urlsplit(self.path)
        self.route, self.query = unquote(parts.path), parse_qs(parts.query)
        failure = self.hub.failure
        failing = failure is not None and re.search(FAILURES[failure], self.route) is not None
        if failing and failure in ("silent", "stuck"):
            self.hub.speaks.wait()
            self.close_connection = True
            return
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {self.route}")
            try:
                if self.route.startswith("/_test/"):
                    self.steer(self.route.removeprefix("/_test/"))
                elif failing:
                    raise Refusal(503 if failure == "down" else 403, f"the Hub is {failure}")
                else:
                    self.answer()
            except Refusal as refusal:
                headers = {"X-Error-Code": refusal.code, "X-Error-Message": str(refusal)} if refusal.code else {}
                self.reply(refusal.status, {"error": str(refusal)}, headers)

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def reply(self, status: int, content: object = b"", headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        if not isinstance(content, bytes):
            self.send_header("Content-Type", "application/json")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    # ---- what tests ask for from inside the clients' processes ----

    def steer(self, what: str) -> None:
        if what in ("up", *FAILURES):
            self.hub.failure = None if what == "up" else what
            (self.hub.speaks.set if what == "up" else self.hub.speaks.clear)()
            self.reply(200, {})
        else:
            name = what.removeprefix("messages/")
            known = ("models", name) in self.hub.repositories
            self.reply(200, self.hub.messages(name) if known else [])

    # ---- the protocol ----

    def answer(self) -> None:
        if self.route == "/api/repos/create":
            return self.create()
        if self.route == "/api/validate-yaml":
            return self.validate_card()
        if match := re.fullmatch(r"/lfs/([0-9a-f]{64})", self.route):
            return self.store(match[1])
        if match := re.fullmatch(r"/cdn/([0-9a-f]{64})", self.route):
            return self.send_content(self.hub.stored[match[1]], {"ETag": f'"{match[1]}"'})
        if match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", self.route):
            return self.lfs_batch(self.find("datasets" if match[1] else "models", match[2]))
        if match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.route):
            return self.resolve(self.find("datasets" if match[1] else "models", match[2]), match[3], match[4])
        if match := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(.*))?", self.route):
            return self.repository(self.find(match[1], match[2]), match[3] or "")
        raise Refusal(404, f"no such page: {self.route}")

    def may_write(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise Refusal(401, "Invalid username or password.")

    def find(self, kind: str, name: str) -> Repository:
        found = self.hub.repositories.get((kind, name))
        if found is None or (found.private and self.headers.get("Authorization") != f"Bearer {TOKEN}"):
            raise Refusal(404, "Repository not found", "RepoNotFound")
        return found

    def tree(self, repository: Repository, revision: str) -> tuple[str, dict[str, File]]:
        oid = repository.commits[-1][0] if revision == "main" else revision
        if oid not in repository.trees:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid, repository.trees[oid]

    def create(self) -> None:
        self.may_write()
        asked = json.loads(self.body)
        kind = asked.get("type", "model") + "s"
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        url = f"{self.hub.url}/{'datasets/' if kind == 'datasets' else ''}{name}"
        if (kind, name) in self.hub.repositories:
            return self.reply(409, {"error": "You already created this repo", "url": url})
        repository = Repository(kind, name, private=asked.get("visibility") == "private")
        repository.commit("initial commit", {".gitattributes": File(b"*.safetensors filter=lfs\n", large=False)})
        self.hub.repositories[kind, name] = repository
        self.reply(200, {"url": url, "name": name})

    def validate_card(self) -> None:
        content = json.loads(self.body)["content"]
        match = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        try:
            data = yaml.safe_load(match[1]) if match else {}
        except yaml.YAMLError as error:
            return self.reply(400, {"errors": [{"message": str(error)}], "warnings": []})
        errors = []
        for entry in data.get("model-index", []):
            if not entry.get("name"):
                errors.append({"message": '"model-index[0].name" is required'})
            for result in entry["results"]:
                if not (
                    result["task"].get("type") and result["dataset"].get("type") and result["dataset"].get("name")
                ):
                    errors.append({"message": '"model-index[0].results[0]" lacks a task or a dataset'})
                if any(not isinstance(metric["value"], int | float | str) for metric in result["metrics"]):
                    errors.append({"message": "a metric has no value"})
        self.reply(400 if errors else 200, {"errors": errors, "warnings": []})

    def lfs_batch(self, repository: Repository) -> None:
        self.may_write()
        asked = json.loads(self.body)
        objects = []
        for item in asked["objects"]:
            answer = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.hub.stored:
                answer["actions"] = {"upload": {"href": f"{self.hub.storage}/lfs/{item['oid']}"}}
            objects.append(answer)
        self.reply(200, {"transfer": "basic", "objects": objects})

    def store(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "the content has another SHA-256 than was said")
        if "Authorization" in self.headers:
            raise Refusal(400, "the token must not go to the storage's host")
        self.hub.stored[oid] = self.body
        self.reply(200)

    def repository(self, repository: Repository, rest: str) -> None:
        action, _, argument = rest.partition("/")
        if action == "preupload":
            return self.preupload(repository)
        if action == "commit":
            return self.commit(repository)
        if action in ("", "revision"):
            oid, tree = self.tree(repository, argument or "main")
            return self.reply(200, self.about(repository, oid, tree))
        if action == "tree":
            revision, _, folder = argument.partition("/")
            return self.reply(200, self.listing(self.tree(repository, revision)[1], folder))
        if action == "paths-info":
            tree = self.tree(repository, argument)[1]
            paths = parse_qs(self.body.decode())["paths"]
            everything = {entry["path"]: entry for entry in self.listing(tree, "", recursive=True)}
            return self.reply(200, [everything[path] for path in paths if path in everything])
        raise Refusal(404, f"no such action: {rest}")

    def about(self, repository: Repository, oid: str, tree: dict[str, File]) -> dict[str, object]:
        return {
            "id": repository.name,
            "sha": oid,
            "private": repository.private,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "lastModified": "2025-01-01T00:00:00.000Z",
            "siblings": [{"rfilename": path} for path in sorted(tree)],
        }

    def listing(self, tree: dict[str, File], folder: str, recursive: bool | None = None) -> list[dict[str, object]]:
        deep = self.query.get("recursive", ["false"])[0].lower() == "true" if recursive is None else recursive
        prefix = f"{folder}/" if folder else ""
        inside = {path: file for path, file in tree.items() if path.startswith(prefix)}
        if folder and not inside:
            raise Refusal(404, f"{folder} does not exist", "EntryNotFound")
        entries: dict[str, dict[str, object]] = {}
        for path, file in sorted(inside.items()):
            names = path.removeprefix(prefix).split("/")
            for depth in range(1, len(names)):
                parent = prefix + "/".join(names[:depth])
                entries[parent] = {"type": "directory", "path": parent, "oid": "0" * 40, "size": 0}
            entries[path] = {"type": "file", "path": path, "oid": file.blob, "size": len(file.content)}
            if file.large:
                entries[path]["lfs"] = {"oid": file.sha256, "size": len(file.content), "pointerSize": 130}
        shallow = (e for path, e in entries.items() if "/" not in path.removeprefix(prefix))
        return list(entries.values()) if deep else list(shallow)

    def preupload(self, repository: Repository) -> None:
        self.may_write()
        tree = repository.files
        answers = []
        for item in json.loads(self.body)["files"]:
            path = item["path"]
            answer = {"path": path, "shouldIgnore": False}
            answer["uploadMode"] = "lfs" if path.endswith(LARGE) else "regular"
            if path in tree:
                answer["oid"] = tree[path].oid
            answers.append(answer)
        self.reply(200, {"files": answers})

    def commit(self, repository: Repository) -> None:
        self.may_write()
        tree, message = dict(repository.files), ""
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
            elif entry["key"] == "file":
                tree[value["path"]] = File(base64.b64decode(value["content"], validate=True), large=False)
            elif entry["key"] == "lfsFile":
                content = self.hub.stored.get(value["oid"])
                if content is None or len(content) != value["size"]:
                    raise Refusal(400, f"{value['path']}: the large file was not uploaded")
                tree[value["path"]] = File(content, large=True)
            elif entry["key"] == "deletedFile":
                del tree[value["path"]]
            else:
                raise Refusal(400, f"unknown entry {entry['key']}")
        oid = repository.commit(message, tree)
        self.reply(
            200, {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repository.name}/commit/{oid}"}
        )

    def resolve(self, repository: Repository, revision: str, path: str) -> None:
        oid, tree = self.tree(repository, revision)
        if path not in tree:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        file = tree[path]
        headers = {"X-Repo-Commit": oid, "ETag": f'"{file.oid}"'}
        if file.large:
            headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.content))}
            return self.reply(302, b"", {**headers, "Location": f"{self.hub.storage}/cdn/{file.sha256}"})
        self.send_content(file.content, headers)

    def send_content(self, content: bytes, headers: dict[str, str]) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            return self.reply(200, content, {**headers, "Accept-Ranges": "bytes"})
        first, last = int(wanted[1]), min(int(wanted[2] or len(content) - 1), len(content) - 1)
        part = {"Content-Range": f"bytes {first}-{last}/{len(content)}", "Accept-Ranges": "bytes"}
        self.reply(206, content[first : last + 1], {**headers, **part})
