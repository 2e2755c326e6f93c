"""A server on loopback that speaks the part of the Hugging Face Hub's API that pushing and loading need. For tests."""

import base64
import contextlib
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_of_the_test"


class Hub:
    """Repositories in memory: name -> {"private", "branches": name -> commit}; commit -> {file name: content}."""

    def __init__(self):
        self.repos, self.commits, self.large, self.requests = {}, {}, {}, []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def make(self, repo, private=False):
        self.repos[repo] = {"private": private, "branches": {}}
        self.commit(repo, "main", {})

    def commit(self, repo, branch, files):
        branches = self.repos[repo]["branches"]
        files = self.commits.get(branches.get(branch), {}) | files
        oid = hashlib.sha1(json.dumps([repo, branch, len(self.commits), sorted(files)]).encode()).hexdigest()
        self.commits[oid], branches[branch] = files, oid
        return oid

    def files(self, repo, revision="main"):
        return self.commits[self.repos[repo]["branches"][revision]]


@contextlib.contextmanager
def serving():
    hub = Hub()
    thread = threading.Thread(target=hub.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.server.shutdown()
        hub.server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self):
        split = urlsplit(self.path)
        path, query = unquote(split.path), parse_qs(split.query)
        body = self._body()
        self.hub.requests.append((self.command, path))
        for method, pattern, act in ROUTES:
            if self.command in method.split() and (found := re.fullmatch(pattern, path)):
                return act(self, body, query, **found.groupdict())
        return self._send(404, {"error": f"no route {self.command} {path}"})

    def _body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, status, content=b"", **headers):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _missing(self, code, status=404):
        self._send(status, {"error": code}, X_Error_Code=code, X_Error_Message=code)

    @property
    def _is_known(self):
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _commit_of(self, repo, revision):
        """The commit, or None after an answer that there is none."""
        known = self.hub.repos.get(repo)
        if known is None or known["private"] and not self._is_known:
            return self._missing("RepoNotFound", 404 if self._is_known else 401)
        oid = known["branches"].get(revision, revision)
        return oid if oid in self.hub.commits else self._missing("RevisionNotFound")

    def create(self, body, _):
        asked = json.loads(body)
        repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if not self._is_known:
            return self._missing("Unauthorized", 401)
        if repo in self.hub.repos:
            return self._send(409, {"error": "exists", "url": f"{self.hub.url}/{repo}"})
        self.hub.make(repo, bool(asked.get("private")) or asked.get("visibility") == "private")
        return self._send(200, {"url": f"{self.hub.url}/{repo}", "name": repo, "id": repo})

    def validate(self, body, _):
        header = yaml.safe_load(json.loads(body)["content"].split("---")[1])
        errors = [] if header.get("license") in (None, "mit", "apache-2.0", "other") else [{"message": "license must be known"}]
        self._send(400 if errors else 200, {"errors": errors, "warnings": []})

    def info(self, _, __, repo, revision="main"):
        if oid := self._commit_of(repo, revision):
            files = [{"rfilename": name} for name in self.hub.commits[oid]]
            known = {"id": repo, "sha": oid, "private": self.hub.repos[repo]["private"], "siblings": files, "tags": []}
            self._send(200, known)

    def tree(self, _, __, repo, revision):
        if oid := self._commit_of(repo, revision):
            files = self.hub.commits[oid].items()
            about = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha256(content).hexdigest()}
                for name, content in files
            ]
            self._send(200, about)

    def listed(self, _, query):
        self._send(200, [{"id": repo} for repo in self.hub.repos if repo.startswith(f"{query['author'][0]}/")])

    def refs(self, _, __, repo):
        branches = self.hub.repos[repo]["branches"].items()
        found = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid} for name, oid in branches]
        self._send(200, {"branches": found, "tags": [], "converts": []})

    def branch(self, _, __, repo, revision):
        branches = self.hub.repos[repo]["branches"]
        if revision in branches:
            return self._missing("exists", 409)
        branches[revision] = branches["main"]
        return self._send(200, {})

    def preupload(self, body, _, repo, revision):
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        self._send(200, {"files": files})

    def batch(self, body, _, repo):
        objects = [
            each | {"actions": {"upload": {"href": f"{self.hub.url}/lfs/{each['oid']}", "header": {}}}}
            for each in json.loads(body)["objects"]
        ]
        self._send(200, {"transfer": "basic", "objects": objects})

    def upload(self, body, _, oid):
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.large[oid] = body
        self._send(200)

    def send_commit(self, body, _, repo, revision):
        files = {}
        if not self._is_known:
            return self._missing("Forbidden", 403)
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                files[line["value"]["path"]] = self.hub.large[line["value"]["oid"]]
        oid = self.hub.commit(repo, revision, files)
        return self._send(200, {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo}/commit/{oid}"})

    def resolve(self, _, __, repo, revision, file):
        if oid := self._commit_of(repo, revision):
            content = self.hub.commits[oid].get(file)
            if content is None:
                return self._send(404, X_Error_Code="EntryNotFound", X_Repo_Commit=oid)
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            return self._send(200, content, ETag=etag, X_Repo_Commit=oid, Accept_Ranges="bytes")


REPO = r"(?P<repo>[^/]+/[^/]+)"
ROUTES = [
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate),
    ("GET", "/api/models", _Handler.listed),
    ("GET", f"/api/models/{REPO}", _Handler.info),
    ("GET", f"/api/models/{REPO}/revision/(?P<revision>[^/]+)", _Handler.info),
    ("GET", f"/api/models/{REPO}/tree/(?P<revision>[^/]+)", _Handler.tree),
    ("GET", f"/api/models/{REPO}/refs", _Handler.refs),
    ("POST", f"/api/models/{REPO}/branch/(?P<revision>[^/]+)", _Handler.branch),
    ("POST", f"/api/models/{REPO}/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    ("POST", f"/api/models/{REPO}/commit/(?P<revision>[^/]+)", _Handler.send_commit),
    ("POST", f"/{REPO}.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", "/lfs/(?P<oid>.+)", _Handler.upload),
    ("GET HEAD", f"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", _Handler.resolve),
]
