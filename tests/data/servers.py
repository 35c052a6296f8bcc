"""Servers for tests of reading from afar: a folder over HTTP and a real S3 (moto), both behind a front that fails.

    with http_server(folder) as server:                     # server.url is http://127.0.0.1:PORT
        server.plan = once("503")                           # each range is refused once, then given
        read(f"{server.url}/a.tar")
        server.requests                                     # [Request(method, path, range, fault, query, bytes), ...]
        server.latency = 0.05                               # seconds before every answer
        server.most_at_once                                 # requests that waited for their answers at the same time

    with s3_server() as server:                             # s3://data exists; AWS_* variables point at it
        pack("images", "s3://data/train", ...)
        server.plan = shares({"503": 0.05, "drop": 0.01})   # of the requests, the same ones each time
        server.bytes_sent(".tar")                           # bytes of answers whose path has this in it

A plan is called with the path, its Range header and how often the two were asked for before, and returns a fault or
None; for a PUT, which can only be refused, "PUT" stands for the range. The faults: "503", "500", "403", "404" or any
status; "drop" (closed half-way), "hang" (silence), "trickle" (a byte every 0.1 s), "short" (one byte less, well
formed), "whole" (no ranges: status 200 and everything), "damage" (a flipped bit). The plan may be replaced any time.
"""

import html
import http.client
import logging
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

import fsspec
import pytest

Plan = Callable[[str, str | None, int], str | None]


@dataclass
class Request:
    """What was asked, entered before it is answered; `bytes` of the body that have been sent so far."""

    method: str
    path: str
    range: str | None
    fault: str | None
    query: str = ""
    bytes: int = 0


def none(path: str, asked: str | None, before: int) -> str | None:
    """Nothing fails."""
    return None


def once(fault: str, path: str = "") -> Plan:
    """The first request of each range of paths with this in them fails."""
    return lambda asked, _, before: fault if before == 0 and path in asked else None


def forever(fault: str, path: str = "") -> Plan:
    """Every request of paths with this in them fails."""
    return lambda asked, _, before: fault if path in asked else None


def shares(of: dict[str, float]) -> Plan:
    """Each fault for its share of the requests."""

    def plan(path: str, asked: str | None, before: int) -> str | None:
        drawn = zlib.crc32(f"{path} {asked} {before}".encode()) / 2**32
        for fault, share in of.items():
            drawn -= share
            if drawn < 0:
                return fault
        return None

    return plan


class Server(ThreadingHTTPServer):
    """A front before `answer(method, path, headers, body)` -> (status, headers, body)."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, answer: Callable[..., tuple[int, dict[str, str], bytes]]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer = answer
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.plan: Plan = none
        self.latency = 0.0
        self.waiting = self.most_at_once = 0
        self.requests: list[Request] = []
        self.ended = threading.Event()
        self._asked: Counter[tuple[str, str | None]] = Counter()
        self._lock = threading.Lock()

    def enter(self, method: str, path: str, query: str, asked: str | None) -> Request:
        """Counts a request and plans its answer."""
        with self._lock:
            fault = self.plan(path, asked, self._asked[path, asked]) if method in ("GET", "PUT") else None
            self._asked[path, asked] += 1
            self.requests.append(Request(method, path, asked, fault, query))
            return self.requests[-1]

    def delay(self) -> None:
        """Waits for the latency, and counts who does at once."""
        with self._lock:
            self.waiting += 1
            self.most_at_once = max(self.most_at_once, self.waiting)
        self.ended.wait(self.latency)
        with self._lock:
            self.waiting -= 1

    def forget(self) -> None:
        """Resets the counts."""
        with self._lock:
            self.requests, self._asked = [], Counter()

    def bytes_sent(self, path: str = "") -> int:
        """Bytes of answers whose path has this in it."""
        return sum(request.bytes for request in self.requests if path in request.path)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is ignored."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def front(self) -> Server:
        assert isinstance(self.server, Server)
        return self.server

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        asked = "PUT" if self.command == "PUT" else self.headers.get("Range")
        place = urlsplit(self.path)
        self.request_now = self.front.enter(self.command, unquote(place.path), place.query, asked)
        self.front.delay()
        fault = self.request_now.fault or ""
        if fault == "hang":
            self.front.ended.wait(60)
            self.close_connection = True
        elif fault.isdigit():
            code = {"503": "SlowDown", "403": "AccessDenied", "404": "NoSuchKey"}.get(fault, "InternalError")
            text = f"<Error><Code>{code}</Code><Message>{code} on purpose</Message></Error>".encode()
            self._send(int(fault), {"Content-Type": "application/xml"}, text, "")
        else:
            left_out = {"Expect", "Range"} if fault == "whole" else {"Expect"}
            headers = {name: value for name, value in self.headers.items() if name not in left_out}
            self._send(*self.front.answer(self.command, self.path, headers, body), fault)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _handle

    def _send(self, status: int, headers: dict[str, str], body: bytes, fault: str) -> None:
        if fault == "damage" and body:
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
        if fault == "short":
            body = body[:-1]
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
                self.send_header(name, value)
        self.send_header("Content-Length", headers["Content-Length"] if self.command == "HEAD" else str(len(body)))
        self.end_headers()
        if fault == "drop":
            body = body[: len(body) // 2]
            self.close_connection = True
        pieces = [body[i : i + 1] for i in range(len(body))] if fault == "trickle" else [body]
        for piece in pieces:
            self.request_now.bytes += len(piece)
            self.wfile.write(piece)
            if fault == "trickle" and self.front.ended.wait(0.1):
                return


@contextmanager
def http_server(folder: Path) -> Iterator[Server]:
    """The files of a folder, with ranges; of each folder in it a page of links, as web servers make them."""

    def answer(method: str, path: str, headers: dict[str, str], body: bytes) -> tuple[int, dict[str, str], bytes]:
        file = folder / unquote(urlsplit(path).path).lstrip("/")
        if file.is_dir():
            return 200, {"Content-Type": "text/html", "Content-Length": "0"}, _page(file) if method == "GET" else b""
        if not file.is_file():
            return 404, {}, b"not here"
        content = file.read_bytes()
        if "Range" not in headers:
            return 200, {"Content-Length": str(len(content))}, b"" if method == "HEAD" else content
        first, last = headers["Range"].removeprefix("bytes=").split("-")
        begin, end = int(first), min(int(last or len(content)), len(content) - 1) + 1
        if begin >= len(content):
            return 416, {}, b""
        return 206, {"Content-Range": f"bytes {begin}-{end - 1}/{len(content)}"}, content[begin:end]

    with _served(Server(answer)) as server:
        yield server


def _page(folder: Path) -> bytes:
    """Links to what is in a folder, among those to its parents and to other orders of itself."""
    names = [quote(file.name, safe="&") + "/" * file.is_dir() for file in folder.iterdir()]
    links = ["?C=N;O=D", "../", "/", *(html.escape(name) for name in names), *(f"./{name}" for name in names[:1])]
    return "".join(f'<a href="{link}">{link}</a>\n' for link in links).encode()


@contextmanager
def s3_server(bucket: str = "data") -> Iterator[Server]:
    """A new, empty S3 with one bucket, which the environment's AWS_* variables name while it lasts."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()

    def answer(method: str, path: str, headers: dict[str, str], body: bytes) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(*moto.get_host_and_port(), timeout=60)
        connection.request(method, path, body or None, headers)
        response = connection.getresponse()
        try:
            return response.status, dict(response.getheaders()), response.read()
        finally:
            connection.close()

    try:
        answer("POST", "/moto-api/reset", {}, b"")
        answer("PUT", f"/{bucket}", {"Host": "s3.amazonaws.com"}, b"")
        with _served(Server(answer)) as server, pytest.MonkeyPatch.context() as environment:
            for name, value in {
                "AWS_ENDPOINT_URL": server.url,
                "AWS_ACCESS_KEY_ID": "test",
                "AWS_SECRET_ACCESS_KEY": "test",
                "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_EC2_METADATA_DISABLED": "true",
            }.items():
                environment.setenv(name, value)
            fsspec.get_filesystem_class("s3").clear_instance_cache()
            yield server
    finally:
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        moto.stop()


@contextmanager
def _served(server: Server) -> Iterator[Server]:
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.ended.set()
        server.shutdown()
        server.server_close()
        thread.join()
