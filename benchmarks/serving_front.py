"""The predict function's handler behind HTTP, in a process of its own; and the store of images and artifacts beside it.

    python -m benchmarks.serving_front predict PORT
    python -m benchmarks.serving_front store PORT FOLDER

Each connection has a thread, so that several clients are answered side by side as several instances of the function would.
The store speaks as much of S3 as a GET needs, and plain HTTP with the same answers: `/{bucket}/{key}` is the file FOLDER/{key},
or for a key of `images/…`, whose last part is `{file}-{anything}.jpg`, FOLDER/{file}.jpg. `/latency/{ms}` sets how long each
answer takes.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import sys
from functools import cache
from pathlib import Path
from socketserver import StreamRequestHandler, ThreadingTCPServer
from types import ModuleType, SimpleNamespace
from typing import Any

LOOPBACK = "127.0.0.1"
HANDLER = Path(__file__).resolve().parent.parent / "functions" / "predict" / "handler.py"


def serve_predict(port: int) -> None:
    spec = importlib.util.spec_from_file_location("handler", HANDLER)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(HANDLER)
    function = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(function)
    ThreadingTCPServer.request_queue_size = 64
    ThreadingTCPServer.daemon_threads = True
    ThreadingTCPServer((LOOPBACK, port), _front(function)).serve_forever()


def event(model: str, route: str, body: str) -> dict[str, Any]:
    """What API Gateway sends of a POST."""
    return {
        "resource": f"/{{model}}/{route}",
        "path": f"/{model}/{route}",
        "httpMethod": "POST",
        "headers": {"Content-Type": "application/json"},
        "queryStringParameters": None,
        "pathParameters": {"model": model},
        "requestContext": {"resourcePath": f"/{{model}}/{route}", "httpMethod": "POST", "stage": "v1", "requestId": "r"},
        "body": body,
        "isBase64Encoded": False,
    }


def _front(function: ModuleType) -> type[StreamRequestHandler]:
    context = SimpleNamespace(
        function_name="predict",
        memory_limit_in_mb=1769,
        invoked_function_arn="arn",
        aws_request_id="r",
        get_remaining_time_in_millis=lambda: 29_000,
    )

    class Front(StreamRequestHandler):
        def handle(self) -> None:
            while asked := self.rfile.readline():
                length = 0
                while (line := self.rfile.readline().lower()) not in (b"\r\n", b""):
                    if line.startswith(b"content-length:"):
                        length = int(line.partition(b":")[2])
                method, path, _ = asked.decode().split(" ")
                status, body = 200, "{}"
                if method == "POST":
                    model, route = path.strip("/").split("/")
                    answer = function.handler(event(model, route, self.rfile.read(length).decode()), context)
                    status, body = answer["statusCode"], answer["body"]
                content = body.encode()
                head = f"HTTP/1.1 {status} .\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
                self.wfile.write(head.encode() + content)

    return Front


class Store(asyncio.Protocol):
    """One connection to the store."""

    latency_s = 0.0

    def __init__(self, folder: Path) -> None:
        self._folder, self._asked = folder, b""

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._asked += data
        while b"\r\n\r\n" in self._asked:
            head, _, self._asked = self._asked.partition(b"\r\n\r\n")
            path = head.split(b" ", 2)[1].decode()
            if path.startswith("/latency/"):
                Store.latency_s = float(path.rpartition("/")[2]) / 1000
            asyncio.get_running_loop().call_later(Store.latency_s, self._answer, path)

    def _answer(self, path: str) -> None:
        if not self._transport.is_closing():
            self._transport.writelines(answer_to(self._folder, path))


@cache
def _read(file: Path) -> tuple[bytes, bytes]:
    content = file.read_bytes()
    tag = hashlib.md5(content, usedforsecurity=False).hexdigest()
    head = f'HTTP/1.1 200 OK\r\nETag: "{tag}"\r\nLast-Modified: Thu, 01 Jan 2026 00:00:00 GMT\r\nContent-Length: {len(content)}'
    return f"{head}\r\n\r\n".encode(), content


def answer_to(folder: Path, path: str) -> tuple[bytes, bytes]:
    """Head and body of the answer to a GET."""
    key = path.split("?")[0].removeprefix("/").partition("/")[2]
    name = f"{key.rpartition('/')[2].partition('-')[0]}.jpg" if key.startswith("images/") else key
    if path.startswith(("/latency/", "/health")):
        return b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n", b"{}"
    try:
        return _read(folder / name)
    except FileNotFoundError:
        return b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", b""


async def serve_store(port: int, folder: Path) -> None:
    server = await asyncio.get_running_loop().create_server(lambda: Store(folder), LOOPBACK, port, backlog=256)
    await server.serve_forever()


if __name__ == "__main__":
    if sys.argv[1] == "predict":
        serve_predict(int(sys.argv[2]))
    else:
        asyncio.run(serve_store(int(sys.argv[2]), Path(sys.argv[3])))
