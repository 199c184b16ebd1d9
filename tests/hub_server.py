"""A Hugging Face Hub on this machine, as far as huggingface_hub asks it for models and data sets, and gives it some."""

import base64
import contextlib
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Hub:
    """Repositories as {name: {revision: {file: bytes}}}; `requests` are the methods and paths that were asked for."""

    def __init__(self):
        self.repos, self.requests = {}, []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def add(self, name, folder, revision="main"):
        files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}
        self.repos.setdefault(name, {})[revision] = files

    def stop(self):
        self._server.shutdown()
        self._server.server_close()


def commit_of(files):
    return hashlib.sha1(
        json.dumps({name: hashlib.sha1(x).hexdigest() for name, x in files.items()}).encode()
    ).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args):
        pass

    def answer(self, status, body=b"", **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def missing(self, code):
        self.answer(404, {"error": code}, X_Error_Code=code)

    def files(self, name, revision):
        """The files of a revision; None after an error was answered."""
        if name not in self.hub.repos:
            return self.missing("RepoNotFound")
        found = self.hub.repos[name].get(revision)
        if found is None:
            found = next((f for f in self.hub.repos[name].values() if commit_of(f) == revision), None)
        return self.missing("RevisionNotFound") if found is None else found

    def do_GET(self):
        self.hub.requests.append((self.command, self.path))
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        parts = parts[1:] if parts[0] == "datasets" else parts
        if parts[:2] in (["api", "models"], ["api", "datasets"]):
            self.list_files(parts)
        elif len(parts) > 4 and parts[2] == "resolve":
            self.send_file(parts)
        else:
            self.missing("EntryNotFound")

    def list_files(self, parts):
        name, kind, revision = "/".join(parts[2:4]), *(parts[4:6] or ["revision", "main"])
        if (files := self.files(name, revision)) is None:
            return
        if kind == "tree":
            entry = {"type": "file"}
            entries = [
                entry | {"path": n, "size": len(x), "oid": hashlib.sha1(x).hexdigest()} for n, x in files.items()
            ]
            self.answer(200, entries)
        else:
            siblings = [{"rfilename": file} for file in files]
            self.answer(200, {"id": name, "sha": commit_of(files), "siblings": siblings})

    def send_file(self, parts):
        if (files := self.files("/".join(parts[:2]), parts[3])) is None:
            return
        commit, content = commit_of(files), files.get("/".join(parts[4:]))
        if content is None:
            self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            return
        etag = f'"{hashlib.sha1(content).hexdigest()}"'
        self.answer(200, content, ETag=etag, X_Repo_Commit=commit)

    do_HEAD = do_GET

    def do_POST(self):
        self.hub.requests.append((self.command, self.path))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = self.path.strip("/").split("/")
        if self.headers.get("authorization") != "Bearer secret":
            return self.answer(401, {"error": "Invalid credentials"}, X_Error_Message="Invalid credentials")
        if parts[1:] == ["repos", "create"]:
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.hub.repos.setdefault(name, {"main": {}})
            return self.answer(200, {"url": f"{self.hub.url}/{name}"})
        if parts[1] == "validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        name, kind, revision = "/".join(parts[2:4]), parts[4], parts[5]
        if kind == "preupload":
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        files = self.hub.repos[name].setdefault(revision, {})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        url, commit = f"{self.hub.url}/{name}/commit", commit_of(files)
        self.answer(200, {"commitUrl": f"{url}/{commit}", "commitOid": commit, "success": True})


@contextlib.contextmanager
def running():
    hub = Hub()
    try:
        yield hub
    finally:
        hub.stop()
