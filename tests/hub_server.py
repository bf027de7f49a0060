"""A Hub for tests: the part of the Hugging Face Hub's HTTP interface that pushing and pulling needs, in memory.

Models, data sets and Spaces, regular and LFS files, revisions, Range requests, private repositories, and downloads
that go wrong. One account, no branches but ``main``, no Xet.

Clients read HF_ENDPOINT when they import huggingface_hub, so they must run in a process of their own:

    def test_push(hub):
        hub.run('BYOCPipeline.from_pretrained("folder").push_to_hub("org/name")')
        assert "model_index.json" in hub.files("org/name")
"""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit


ACCOUNT, TOKEN = "me", "hf_test"  # the one that there is, which may do everything
LFS_SUFFIXES = (".safetensors", ".bin", ".parquet", ".tif", ".tiff", ".npy", ".npz", ".png")
NO_COMMIT = "0" * 40


class HubError(Exception):
    def __init__(self, status: int, code: str, message: str, **fields: str):
        super().__init__(message)
        self.status, self.code, self.content = status, code, {"error": message, **fields}


class HubServer:
    """Serve from construction to `close`. `url` is the HF_ENDPOINT; `home` holds the clients' cache."""

    def __init__(self, home: Path):
        self.home = home
        self.repos: dict[str, dict] = {}  # "models/org/name" -> {"head": sha, "commits": {sha: {path: bytes}}}
        self.lfs_objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []  # (method, path) in the order they came
        self.ranges: list[str] = []  # the Range headers, in their order
        # (repository, file) -> bytes after which its next downloads break off, one by one; what is sent in its place
        self.cut: dict[tuple[str, str], list[int]] = {}
        self.spoiled: dict[tuple[str, str], bytes] = {}
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()

    def run(self, code: str, timeout: float = 120, token: str | None = TOKEN) -> str:
        """Run Python code in a process whose Hub is this one and whose cache is `home`; returns what it printed."""
        source = Path(__file__).parents[1] / "src"
        env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        env |= {"HF_ENDPOINT": self.url, "HF_HOME": str(self.home), "NO_PROXY": "127.0.0.1"}
        env |= {"HF_TOKEN": token} if token else {}
        env |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(source), env.get("PYTHONPATH")]))
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, cwd=self.home, timeout=timeout, capture_output=True, text=True
        )
        if done.returncode != 0:
            raise AssertionError(f"the client failed with exit status {done.returncode}:\n{done.stderr[-4000:]}")
        return done.stdout

    def files(self, repo_id: str, repo_type: str = "model", revision: str = "main") -> dict[str, bytes]:
        """path -> content of a revision."""
        return self.snapshot(f"{repo_type}s/{repo_id}", revision)[1]

    @staticmethod
    def sha256(data: bytes) -> str:
        """What a LFS object is stored under."""
        return hashlib.sha256(data).hexdigest()

    def put(self, repo_id: str, files: dict[str, bytes], private: bool = False) -> str:
        """Make a model's repository hold these files, path -> content, by a commit; returns its sha."""
        organization, name = repo_id.split("/")
        key = f"models/{repo_id}"
        if key not in self.repos:
            self.create({"name": name, "organization": organization, "private": private})
        lines = [{"key": "deletedFolder", "value": {"path": ""}}]
        for path, data in files.items():
            lines.append({"key": "file", "value": {"path": path, "content": base64.b64encode(data)}})
        return self.commit(key, "main", lines)["commitOid"]

    def check_access(self, method: str, path: str, authorization: str) -> None:
        """Refuse those without the account's token what is private, whatever writes, and the account itself."""
        is_private = any(
            repo.get("private") and f"/{key.removeprefix('models/')}/" in f"{path}/"
            for key, repo in self.repos.items()
        )
        is_ours = method == "POST" and "/paths-info/" not in path or path == "/api/whoami-v2"
        if authorization != f"Bearer {TOKEN}" and (is_private or is_ours):
            raise HubError(401, "", "Invalid username or password.")

    def snapshot(self, key: str, revision: str) -> tuple[str, dict[str, bytes]]:
        if key not in self.repos:
            raise HubError(404, "RepoNotFound", f"no repository {key}")
        repo = self.repos[key]
        sha = repo["head"] if revision == "main" else revision
        if sha not in repo["commits"]:
            raise HubError(404, "RevisionNotFound", f"no revision {revision} of {key}")
        return sha, repo["commits"][sha]

    # What the endpoints answer

    def create(self, body: dict) -> dict:
        repo_id = "/".join([body.get("organization") or ACCOUNT, body["name"]])
        key = f"{body.get('type') or 'model'}s/{repo_id}"
        prefix = "" if key.startswith("models/") else key.split("/")[0] + "/"
        url = f"{self.url}/{prefix}{repo_id}"
        if key in self.repos:
            raise HubError(409, "RepoExists", f"{key} exists already", url=url)
        private = body.get("visibility") == "private" or body.get("private", False)
        self.repos[key] = {"head": NO_COMMIT, "commits": {NO_COMMIT: {}}, "private": private}
        return {"url": url, "name": repo_id, "id": repo_id}

    def preupload(self, key: str, revision: str, body: dict) -> dict:
        _, files = self.snapshot(key, revision)
        return {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular",
                    "shouldIgnore": False,
                    "oid": _blob_id(files[file["path"]]) if file["path"] in files else None,
                }
                for file in body["files"]
            ]
        }

    def lfs_batch(self, body: dict) -> dict:
        objects = []
        for item in body["objects"]:
            entry = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.lfs_objects:
                entry["actions"] = {"upload": {"href": f"{self.url}/lfs/{item['oid']}"}}
            objects.append(entry)
        return {"transfer": "basic", "objects": objects}

    def commit(self, key: str, revision: str, lines: list[dict]) -> dict:
        parent, files = self.snapshot(key, revision)
        files = dict(files)
        for line in lines:
            kind, value = line["key"], line["value"]
            if kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                if value["oid"] not in self.lfs_objects:
                    raise HubError(400, "BadRequest", f"LFS object {value['oid']} was never uploaded")
                files[value["path"]] = self.lfs_objects[value["oid"]]
            elif kind == "deletedFile":
                del files[value["path"]]
            elif kind == "deletedFolder":
                files = {path: data for path, data in files.items() if not path.startswith(value["path"])}
        tree = [parent] + [f"{path} {_blob_id(data)}" for path, data in sorted(files.items())]
        sha = hashlib.sha1("\n".join(tree).encode()).hexdigest()
        self.repos[key]["commits"][sha] = files
        self.repos[key]["head"] = sha
        url = f"{self.url}/{key.removeprefix('models/')}/commit/{sha}"
        return {"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": "", "pullRequestUrl": None}

    def info(self, key: str, revision: str) -> dict:
        sha, files = self.snapshot(key, revision)
        repo_id = key.split("/", 1)[1]
        siblings = [{"rfilename": path} for path in sorted(files)]
        tags = ["diffusers"] if "model_index.json" in files else []
        common = {"id": repo_id, "sha": sha, "siblings": siblings, "tags": tags, "gated": False}
        common |= {"private": self.repos[key].get("private", False)}
        return common | {"modelId": repo_id, "disabled": False, "downloads": 0, "likes": 0}

    def tree(self, key: str, revision: str, folder: str = "", recursive: bool = True) -> list[dict]:
        _, files = self.snapshot(key, revision)
        prefix = f"{folder}/" if folder else ""
        entries, folders = [], set()
        for path, data in sorted(files.items()):
            if not path.startswith(prefix):
                continue
            parts = path[len(prefix) :].split("/")
            folders |= {
                prefix + "/".join(parts[:end]) for end in range(1, len(parts) if recursive else min(len(parts), 2))
            }
            if recursive or len(parts) == 1:
                entries.append(_file_entry(path, data))
        if folder and not entries and not folders:
            raise HubError(404, "EntryNotFound", f"no folder {folder} in {key}")
        return [{"type": "directory", "path": path, "oid": NO_COMMIT, "size": 0} for path in sorted(folders)] + entries

    def paths_info(self, key: str, revision: str, paths: list[str]) -> list[dict]:
        _, files = self.snapshot(key, revision)
        return [_file_entry(path, files[path]) for path in paths if path in files]


def _blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _file_entry(path: str, data: bytes) -> dict:
    entry = {"type": "file", "path": path, "size": len(data), "oid": _blob_id(data)}
    if path.endswith(LFS_SUFFIXES):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return entry


class _Handler(BaseHTTPRequestHandler):
    """One request: read it, find its endpoint, answer."""

    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_any(self):
        url = urlsplit(self.path)
        path = unquote(url.path)
        self.hub.requests.append((self.command, path))
        body = self.read_body()
        try:
            self.hub.check_access(self.command, path, self.headers.get("Authorization", ""))
            if match := re.fullmatch(r"/((?:(?:datasets|spaces)/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                repo, revision, file = match.groups()
                return self.answer_file(repo if repo.count("/") == 2 else f"models/{repo}", revision, file)
            if self.command == "PUT" and (match := re.fullmatch(r"/lfs/([0-9a-f]{64})", path)):
                if hashlib.sha256(body).hexdigest() != match[1]:
                    raise HubError(400, "BadRequest", "the content does not have the announced sha256")
                self.hub.lfs_objects[match[1]] = body
                return self.answer(200, b"")
            self.answer(200, json.dumps(self.answer_json(path, url.query, body)).encode())
        except HubError as error:
            content = json.dumps(error.content).encode()
            self.answer(error.status, content, {"X-Error-Code": error.code, "X-Error-Message": str(error)})
        except (KeyError, ValueError):  # a request this server does not understand: show it in the client's error
            self.answer(400, json.dumps({"error": traceback.format_exc()}).encode())

    do_GET = do_HEAD = do_POST = do_PUT = do_any

    def answer_json(self, path: str, query: str, body: bytes):
        hub, method = self.hub, self.command
        if (method, path) == ("POST", "/api/repos/create"):
            return hub.create(json.loads(body))
        if (method, path) == ("GET", "/api/whoami-v2"):
            return {"type": "user", "name": ACCOUNT, "orgs": []}
        if (method, path) == ("POST", "/api/validate-yaml"):
            return {"errors": [], "warnings": []}
        if method == "POST" and path.endswith(".git/info/lfs/objects/batch"):
            return hub.lfs_batch(json.loads(body))
        if match := re.fullmatch(
            r"/api/((?:models|datasets|spaces)/[^/]+/[^/]+)(?:/([a-z-]+)/([^/]+)(?:/(.+))?)?", path
        ):
            key, endpoint, revision, folder = match.groups()
            if method == "GET" and endpoint in (None, "revision"):
                return hub.info(key, revision or "main")
            if method == "GET" and endpoint == "tree":
                return hub.tree(key, revision, folder or "", "recursive=true" in query.lower())
            if method == "POST" and endpoint == "preupload":
                return hub.preupload(key, revision, json.loads(body))
            if method == "POST" and endpoint == "commit":
                return hub.commit(key, revision, [json.loads(line) for line in body.splitlines() if line.strip()])
            if method == "POST" and endpoint == "paths-info":
                return hub.paths_info(key, revision, parse_qs(body.decode())["paths"])
        raise HubError(404, "NotImplemented", f"the test Hub has no endpoint {method} {path}")

    def answer_file(self, key: str, revision: str, path: str):
        sha, files = self.hub.snapshot(key, revision)
        if path not in files:
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
        data = files[path]
        etag = hashlib.sha256(data).hexdigest() if path.endswith(LFS_SUFFIXES) else _blob_id(data)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if self.command == "GET":
            data = self.hub.spoiled.get((key.removeprefix("models/"), path), data)
            self.hub.ranges += filter(None, [self.headers.get("Range")])
        if match := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            first, last = match.groups()
            start = int(first) if first else max(len(data) - int(last), 0)
            stop = min(int(last) + 1, len(data)) if first and last else len(data)
            if start >= stop:
                return self.answer(416, b"", {"Content-Range": f"bytes */{len(data)}"})
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            return self.answer(206, data[start:stop], headers, self.next_cut(key, path))
        self.answer(200, data, headers, self.next_cut(key, path))

    def next_cut(self, key: str, path: str) -> int | None:
        cuts = self.hub.cut.get((key.removeprefix("models/"), path))
        return cuts.pop(0) if cuts and self.command == "GET" else None

    def answer(
        self, status: int, content: bytes, headers: dict[str, str] | None = None, stop_after: int | None = None
    ):
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:stop_after])
        if stop_after is not None:
            self.close_connection = True

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)
