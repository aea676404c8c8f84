"""Two servers on 127.0.0.1: an index of wheels for pip, and a hub of repositories."""

from __future__ import annotations

import hashlib
import io
import json
import threading
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

__all__ = ["Hub", "Index", "make_wheel", "serving"]

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Index:
    """The "simple" index that pip reads; `wheels` may change while it runs."""

    def __init__(self) -> None:
        self.wheels: dict[str, bytes] = {}  # file name -> content
        self.served: list[str] = []  # names of wheels, in the order they were asked for
        self.url = ""

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        """Serve /simple/PROJECT/ and /files/WHEEL."""
        name = request.path.strip("/").rpartition("/")[2]
        if request.path.startswith("/files/"):
            self.served.append(name)
            _send(request, 200, self.wheels[name], "application/octet-stream")
            return
        prefix = name.replace("-", "_") + "-"
        links = [f'<a href="/files/{w}">{w}</a>' for w in self.wheels if w.startswith(prefix)]
        page = f"<!DOCTYPE html><html><body>{''.join(links)}</body></html>".encode()
        _send(request, 200 if links else 404, page, "text/html")


class Hub:
    """What huggingface_hub asks of a hub, for one repository `acme/tiny`."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self.files = dict(files)
        self.cut_after: int | None = None  # bytes of the next large answer before the line drops
        self.requests: list[tuple[str, str, str | None]] = []  # method, path, Range
        self.declared: dict[str, str] = {}  # digests to lie about
        self.gated = False
        self.url = ""

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        """Serve the model's description, its tree and its files."""
        path = request.path.partition("?")[0]
        self.requests.append((request.command, path, request.headers.get("Range")))
        if self.gated:
            request.send_response(403)
            request.send_header("X-Error-Code", "GatedRepo")
            request.send_header("Content-Length", "0")
            request.end_headers()
        elif path.startswith("/api/models/acme/tiny/tree/"):
            _send_json(request, [self._entry("path", name) for name in self.files])
        elif path.startswith("/api/models/acme/tiny"):
            siblings = [self._entry("rfilename", name) for name in self.files]
            card = {"license": "apache-2.0"}
            info = {"id": "acme/tiny", "sha": COMMIT, "siblings": siblings, "cardData": card}
            _send_json(request, info)
        elif path.startswith(f"/acme/tiny/resolve/{COMMIT}/"):
            self._send_file(request, path.removeprefix(f"/acme/tiny/resolve/{COMMIT}/"))
        else:
            request.send_response(404)
            request.send_header("X-Error-Code", "RepoNotFound")
            request.send_header("Content-Length", "0")
            request.end_headers()

    def _entry(self, key: str, name: str) -> dict[str, Any]:
        content = self.files[name]
        digest = self.declared.get(name, hashlib.sha256(content).hexdigest())
        entry: dict[str, Any] = {key: name, "type": "file", "size": len(content)}
        entry["oid"] = entry["blobId"] = hashlib.sha1(content).hexdigest()
        if len(content) > 1000:
            entry["lfs"] = {"oid": digest, "sha256": digest, "size": len(content)}
            entry["lfs"]["pointerSize"] = 134
        return entry

    def _send_file(self, request: BaseHTTPRequestHandler, name: str) -> None:
        content = self.files[name]
        start = 0
        if given := request.headers.get("Range"):
            start = int(given.removeprefix("bytes=").partition("-")[0])
        body = content[start:]
        request.send_response(206 if start else 200)
        request.send_header("Content-Length", str(len(body)))
        request.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        request.send_header("X-Repo-Commit", COMMIT)
        request.send_header("Accept-Ranges", "bytes")
        if start:
            span = f"bytes {start}-{len(content) - 1}/{len(content)}"
            request.send_header("Content-Range", span)
        request.end_headers()
        if request.command == "HEAD":
            return
        if self.cut_after is not None and len(body) > self.cut_after:
            body, self.cut_after = body[: self.cut_after], None
            request.close_connection = True
        request.wfile.write(body)


@contextmanager
def serving(server: Index | Hub) -> Iterator[None]:
    """Run one of the two servers on a free port of loopback; its `url` is set."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            server.answer(self)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            """Stay silent."""

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    server.url = f"http://127.0.0.1:{http.server_port}"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


def make_wheel(project: str, version: str, files: Mapping[str, bytes]) -> tuple[str, bytes]:
    """A wheel that pip accepts, holding `files`: its name and its bytes."""
    stem = f"{project.replace('-', '_')}-{version}"
    metadata = f"Metadata-Version: 2.1\nName: {project}\nVersion: {version}\n"
    wheel = "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    members = {
        **files,
        f"{stem}.dist-info/METADATA": metadata.encode(),
        f"{stem}.dist-info/WHEEL": wheel.encode(),
    }
    record = "".join(f"{name},,\n" for name in members) + f"{stem}.dist-info/RECORD,,\n"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in {**members, f"{stem}.dist-info/RECORD": record.encode()}.items():
            archive.writestr(name, content)
    return f"{stem}-py3-none-any.whl", buffer.getvalue()


def _send(request: BaseHTTPRequestHandler, status: int, body: bytes, kind: str) -> None:
    request.send_response(status)
    request.send_header("Content-Type", kind)
    request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(body)


def _send_json(request: BaseHTTPRequestHandler, body: object) -> None:
    _send(request, 200, json.dumps(body).encode(), "application/json")
