"""A model hub on loopback, as far as huggingface_hub asks it: repositories, trees, files with ranges, and faults.

with HubServer({"org/model": directory}) as hub:
    environment = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0"}
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34
_API = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/(?P<what>revision|tree)/(?P<revision>[^/]+)")
_FILE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
_RANGE = re.compile(r"bytes=(\d+)-(\d+)")


@dataclass
class Faults:
    """What goes wrong from now on."""

    break_off_after: int | None = None  # bytes of each answer that carries a range
    breaks: int = 1 << 30  # how many answers it happens to
    ignore_ranges: bool = False
    unavailable: int = 0  # answers 503 so many times
    drip: threading.Event | None = None  # answers that carry a range come a byte at a time until it is set


@dataclass
class HubServer:
    """Serves directories as repositories, each at one commit. A context manager."""

    repos: Mapping[str, Path]
    faults: Faults = field(default_factory=Faults)
    ranges: list[tuple[str, int, int]] = field(default_factory=list)  # of large files: name, first and last byte
    requests: list[str] = field(default_factory=list)

    def __enter__(self) -> Self:
        hub = self

        class Handler(_Handler):
            server_state = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def endpoint(self) -> str:
        """For HF_ENDPOINT."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server_state: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        self.server_state.requests.append(f"{self.command} {self.path}")

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path, faults = unquote(urlsplit(self.path).path), self.server_state.faults
        if faults.unavailable:
            faults.unavailable -= 1
            self._send(503, b"", {})
        elif match := _API.fullmatch(path):
            self._send_api(match["repo"], match["what"])
        elif match := _FILE.fullmatch(path):
            self._send_file(match["repo"], match["file"])
        else:
            self._send(404, b"", {})

    def _send_api(self, repo: str, what: str) -> None:
        directory = self.server_state.repos.get(repo)
        if directory is None:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            return
        files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
        names = [path.relative_to(directory).as_posix() for path in files]
        if what == "tree":
            entries = [
                {"type": "file", "path": name, "size": path.stat().st_size, "oid": _etag(path)}
                for name, path in zip(names, files, strict=True)
            ]
            self._send_json(entries)
        else:
            self._send_json({"id": repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]})

    def _send_file(self, repo: str, name: str) -> None:
        path = self.server_state.repos.get(repo, Path("/nowhere")) / name
        if not path.is_file():
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{_etag(path)}"', "Accept-Ranges": "bytes"}
        data, wanted = path.read_bytes(), _RANGE.fullmatch(self.headers.get("Range", ""))
        if wanted is None or self.server_state.faults.ignore_ranges:
            self._send(200, data, headers)
            return
        first, last = int(wanted[1]), min(int(wanted[2]), len(data) - 1)
        if first >= len(data):
            self._send(416, b"", {"Content-Range": f"bytes */{len(data)}"})
            return
        self.server_state.ranges.append((name, first, last))
        self._send(206, data[first : last + 1], headers | {"Content-Range": f"bytes {first}-{last}/{len(data)}"})

    def _send_json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | dict(headers)).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        faults = self.server_state.faults
        if status == 206 and faults.break_off_after is not None and faults.breaks > 0:
            faults.breaks -= 1
            self.wfile.write(body[: faults.break_off_after])
            self.close_connection = True
            return
        sent = 0
        while status == 206 and faults.drip is not None and sent < len(body) and not faults.drip.wait(0.002):
            self.wfile.write(body[sent : sent + 1])
            sent += 1
        self.wfile.write(body[sent:])


def _etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes(), usedforsecurity=False).hexdigest()
