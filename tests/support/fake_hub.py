"""A model hub on this machine, which answers as huggingface.co does."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0" * 39


class _Hub(BaseHTTPRequestHandler):
    """Repositories as dictionaries of files, in memory; every commit is the newest."""

    def log_message(self, *_):
        pass

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.split("?")[0]
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            if name.startswith("others/"):
                return self._answer(403, {"error": "You don't have the rights"})
            self.server.repos.setdefault(name, {})
            self.server.asked.append(asked)
            return self._answer(200, {"url": f"{self.server.address}/{name}", "id": name, "name": name})
        if "/preupload/" in path:
            files = [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]
            return self._answer(200, {"files": files})
        if "/commit/" in path:
            name = path.removeprefix("/api/models/").split("/commit/")[0]
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.repos[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                else:
                    self.server.asked.append(line["value"])
            commit = f"{COMMIT}{len(self.server.asked) % 10}"
            url = f"{self.server.address}/{name}/commit/{commit}"
            return self._answer(200, {"success": True, "commitOid": commit, "commitUrl": url})
        if path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        return self._answer(404, {"error": path})

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.split("?")[0]
        commit = f"{COMMIT}{len(self.server.asked) % 10}"
        if path.startswith("/api/models/"):
            name = "/".join(path.split("/")[3:5])
            if name not in self.server.repos:
                return self._answer(404, {"error": "Repository not found"}, **{"X-Error-Code": "RepoNotFound"})
            files = self.server.repos[name]
            if "/tree/" in path:
                listed = [{"type": "file", "path": f, "size": len(c), "oid": _oid(c)} for f, c in files.items()]
                return self._answer(200, listed)
            return self._answer(
                200, {"id": name, "sha": commit, "siblings": [{"rfilename": f} for f in files], "tags": []}
            )
        name, _, rest = path[1:].partition("/resolve/")
        content = self.server.repos.get(name, {}).get(rest.partition("/")[2])
        if content is None:
            return self._answer(404, {"error": "Entry not found"}, **{"X-Error-Code": "EntryNotFound"})
        return self._answer(200, content, **{"ETag": f'"{_oid(content)}"', "X-Repo-Commit": commit})

    def _answer(self, status, content, **headers):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _oid(content):
    return hashlib.sha1(content).hexdigest()


@contextmanager
def fake_hub(monkeypatch, cache):
    """A running hub, which huggingface_hub uses while it runs; ``repos`` holds the files by repository."""
    from huggingface_hub import constants

    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.repos, server.asked = {}, []
    server.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
