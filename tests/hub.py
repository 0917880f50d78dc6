"""A Hub on this machine: as much of its HTTP interface as a push and a download need."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Files by repository and path."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def hub() -> Iterator[Hub]:
    server = Hub()
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        if self.path == "/api/repos/create":
            name = json.loads(body)
            repository = f"{name['organization']}/{name['name']}" if name.get("organization") else name["name"]
            self.server.repositories.setdefault(repository, {})
            self._answer({"url": f"{self.server.endpoint}/{repository}"})
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [
                {"path": each["path"], "uploadMode": "regular", "shouldIgnore": False}
                for each in json.loads(body)["files"]
            ]
            self._answer({"files": files})
        else:
            (repository,) = re.findall("/api/models/(.+)/commit/main", self.path)
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.server.repositories[repository][line["value"]["path"]] = content
            self._answer({"commitOid": COMMIT, "commitUrl": f"{self.server.endpoint}/{repository}/commit/{COMMIT}"})

    def do_HEAD(self) -> None:
        self._resolve()

    def do_GET(self) -> None:
        if found := re.findall("/api/models/([^/]+/[^/]+)/tree/", self.path):
            files = self.server.repositories[found[0]]
            self._answer([{"type": "file", "path": name, "size": len(c), "oid": COMMIT} for name, c in files.items()])
        elif found := re.findall("/api/models/([^/?]+/[^/?]+)", self.path):
            siblings = [{"rfilename": name} for name in self.server.repositories[found[0]]]
            self._answer({"id": found[0], "sha": COMMIT, "siblings": siblings})
        else:
            self._resolve()

    def _resolve(self) -> None:
        found = re.fullmatch("/([^/]+/[^/]+)/resolve/[^/]+/(.+)", self.path)
        repository, path = found.groups() if found else ("", "")
        content = self.server.repositories.get(repository, {}).get(path)
        if content is None:
            code = "EntryNotFound" if repository in self.server.repositories else "RepoNotFound"
            self._answer({"error": code}, 404, {"X-Error-Code": code})
        else:
            self._send(content, 200, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT})

    def _answer(self, found: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(json.dumps(found).encode(), status, {"Content-Type": "application/json"} | (headers or {}))

    def _send(self, content: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass
