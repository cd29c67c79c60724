"""A hub on loopback that speaks the protocols of Hugging Face and ModelScope to the real client library.

Files are served by a second host (another name and port), as the real hub does for large ones. `faults` maps a file's
name to a list of things that go wrong, one for each GET of its bytes; afterwards all goes well.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34


@dataclass
class Hub:
    repos: dict[str, dict[str, bytes]]  # "models/owner/name" → path → bytes
    commit: str = COMMIT
    faults: dict[str, list] = field(default_factory=dict)
    status: int = 0  # what every listing answers instead
    headers: dict[str, str] = field(default_factory=dict)  # that go with it
    status_times: int = 1 << 30
    bare: bool = False  # a listing of names only, as some mirrors give
    silent: bool = False  # no listing at all: a mirror that only gives files
    delay: float = 0.0  # seconds before each piece of 64 KiB
    revisions: set[str] = field(default_factory=lambda: {"main", "master"})
    requests: list[tuple[str, str]] = field(default_factory=list)
    authorized: list[str] = field(default_factory=list)  # requests to the second host that carried a token
    sent: int = 0  # bytes of files

    def __enter__(self) -> Hub:
        self.servers = [Server(("127.0.0.1", 0), _handler(self, second)) for second in (False, True)]
        for server in self.servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        self.endpoint = f"http://127.0.0.1:{self.servers[0].server_port}"
        self.second = f"http://localhost:{self.servers[1].server_port}"
        return self

    def __exit__(self, *_: object) -> None:
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def forget(self) -> None:
        self.requests.clear()
        self.sent = 0


class Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is no news; everything else is a defect of the test."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def is_large(path: str) -> bool:
    return not path.endswith(".json")


def _handler(hub: Hub, second: bool) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.go()

        def do_GET(self) -> None:
            self.go()

        def go(self) -> None:
            hub.requests.append((self.command, self.path))
            url = urlsplit(self.path)
            path, query = unquote(url.path), {key: value[0] for key, value in parse_qs(url.query).items()}
            if second:
                if self.headers.get("Authorization"):
                    hub.authorized.append(self.path)
                _, kind, owner, name, *rest = path.split("/")
                return self.file(hub.repos[f"{kind}/{owner}/{name}"], "/".join(rest))
            if match := re.fullmatch(r"/api/v1/(models|datasets)/([^/]+/[^/]+)/repo(/files|/tree)?", path):
                return self.modelscope(*match.groups(), query)
            if match := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)/revision/(.+)", path):
                return self.info(*match.groups())
            if match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                return self.resolve(*match.groups())
            return self.answer(404)

        def info(self, kind: str, repo: str, revision: str) -> None:
            if hub.silent:
                return self.answer(404)
            if hub.status and hub.status_times > 0:
                hub.status_times -= 1
                return self.answer(hub.status, headers=hub.headers)
            files = hub.repos.get(f"{kind}/{repo}")
            if files is None:
                return self.answer(404, headers={"X-Error-Code": "RepoNotFound"})
            if revision not in hub.revisions | {hub.commit} and not re.fullmatch("[0-9a-f]{40}", revision):
                return self.answer(404, headers={"X-Error-Code": "RevisionNotFound"})
            commit = revision if re.fullmatch("[0-9a-f]{40}", revision) else hub.commit
            record = {"id": repo, "sha": commit, "siblings": [self.sibling(*file) for file in files.items()]}
            return self.answer(200, json.dumps(record).encode())

        def sibling(self, path: str, data: bytes) -> dict:
            if hub.bare:
                return {"rfilename": path}
            record = {"rfilename": path, "size": len(data), "blobId": git_sha1(data)}
            if is_large(path):
                record["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            return record

        def resolve(self, dataset: str | None, repo: str, revision: str, path: str) -> None:
            key = f"{'datasets' if dataset else 'models'}/{repo}"
            exists = revision in hub.revisions | {hub.commit} or re.fullmatch("[0-9a-f]{40}", revision)
            data = hub.repos[key].get(path) if exists and hub.status != 404 else None
            if data is None:
                return self.answer(404, headers={"X-Error-Code": "EntryNotFound"})
            if not is_large(path):
                return self.file(hub.repos[key], path, {"ETag": f'"{git_sha1(data)}"', "X-Repo-Commit": revision})
            headers = {
                "Location": f"{hub.second}/{key}/{path}",
                "X-Repo-Commit": revision,
                "X-Linked-Size": str(len(data)),
                "X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"',
            }
            return self.answer(302, headers=headers)

        def modelscope(self, kind: str, repo: str, listing: str | None, query: dict[str, str]) -> None:
            files = hub.repos.get(f"{kind}/{repo}")
            if files is None or query["Revision"] not in hub.revisions:
                return self.answer(404, b'{"Code": 404, "Success": false, "Message": "not found"}')
            if not listing:
                return self.file(files, query["FilePath"])
            assert listing == ("/files" if kind == "models" else "/tree")
            entries = [{"Type": "tree", "Path": "folder", "Name": "folder"}] + [
                {"Type": "blob", "Path": path, "Name": path, "Size": len(data),
                 "Sha256": hashlib.sha256(data).hexdigest()}
                for path, data in files.items()
            ]  # fmt: skip
            return self.answer(200, json.dumps({"Code": 200, "Success": True, "Data": {"Files": entries}}).encode())

        def file(self, files: dict[str, bytes], path: str, headers: dict[str, str] | None = None) -> None:
            data, headers = files[path], dict(headers or {})
            faults = hub.faults.get(path, [])
            fault, value = faults.pop(0) if faults and self.command == "GET" else ("", 0)
            if fault == "status":
                return self.answer(value)
            if fault == "html":
                return self.answer(200, b"<!DOCTYPE html><html>sign in</html>", {"Content-Type": "text/html"})
            if fault == "bytes":
                return self.answer(200, value)
            start, stop = 0, len(data)
            if (asked := self.headers.get("Range")) and fault != "whole":
                first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", asked).groups()
                start, stop = int(first), int(last) + 1 if last else len(data)
                headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            body = data[start:stop]
            if fault == "corrupt":
                body = bytes(body[:-1]) + bytes([body[-1] ^ 1])
            self.send_response(206 if "Content-Range" in headers else 200)
            for name, text in ({"Content-Length": str(len(body)), "Accept-Ranges": "bytes"} | headers).items():
                self.send_header(name, text)
            self.end_headers()
            if self.command == "GET":
                self.pieces(body[:value] if fault in ("cut", "stall") else body)
            if fault == "stall":
                time.sleep(2.5)
            if fault in ("cut", "stall"):
                self.close_connection = True

        def pieces(self, body: bytes) -> None:
            try:
                for at in range(0, len(body), 1 << 16):
                    time.sleep(hub.delay)
                    self.wfile.write(body[at : at + (1 << 16)])
                    hub.sent += len(body[at : at + (1 << 16)])
            except OSError:
                self.close_connection = True

        def answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, text in ({"Content-Length": str(len(body))} | (headers or {})).items():
                self.send_header(name, text)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

    return Handler


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
