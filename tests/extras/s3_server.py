"""A real S3 server on the loopback (moto), and a proxy before it that injects faults."""

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Fault = Callable[
    [int, str, str], str
]  # of a request's number, method and path: "", "500", "cut", "half", "slow", "403"
SLOW = 0.1  # seconds


@contextmanager
def s3_server() -> Iterator[int]:
    """moto in server mode. Gives its port."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        yield server.get_host_and_port()[1]
    finally:
        server.stop()


class Proxy:
    """Passes requests on to a port, each with the fault that `fault` names.

    Attributes:
        seen: method and path of each request, and the fault it met.
    """

    def __init__(self, behind: int) -> None:
        self.fault: Fault = lambda number, method, path: ""
        self.seen: list[tuple[str, str, str]] = []
        self._numbers = itertools.count()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments: Any) -> None:
                return

            def _pass_on(self) -> None:
                number, path = next(proxy._numbers), self.path.partition("?")[0]
                body = self._body()
                fault = proxy.fault(number, self.command, path)
                proxy.seen.append((self.command, path, fault))
                if fault in ("500", "403"):
                    code, word = (500, "InternalError") if fault == "500" else (403, "AccessDenied")
                    content = f"<Error><Code>{word}</Code><Message>{word}</Message></Error>".encode()
                    self._answer(code, {"Content-Type": "application/xml"}, content)
                    return
                if fault == "cut":
                    self.close_connection = True
                    return
                connection = HTTPConnection("127.0.0.1", behind, timeout=30)
                headers = {name: value for name, value in self.headers.items() if name.lower() != "transfer-encoding"}
                connection.request(self.command, self.path, body, headers)
                answer = connection.getresponse()
                content = answer.read()
                connection.close()
                if fault == "slow":
                    time.sleep(SLOW)
                half = fault == "half" and len(content) > 1
                self._answer(
                    answer.status, dict(answer.headers), content, content[: len(content) // 2] if half else None
                )
                self.close_connection |= half

            def _answer(self, code: int, headers: dict[str, str], content: bytes, sent: bytes | None = None) -> None:
                self.send_response_only(code)
                for name, value in headers.items():
                    if name.lower() not in ("content-length", "connection", "transfer-encoding"):
                        self.send_header(name, value)
                length = headers.get("Content-Length") if self.command == "HEAD" else None
                self.send_header("Content-Length", length or str(len(content)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content if sent is None else sent)

            def _body(self) -> bytes:
                if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
                    content = b""
                    while size := int(self.rfile.readline().split(b";")[0], 16):
                        content += self.rfile.read(size)
                        self.rfile.readline()
                    self.rfile.readline()
                    return content
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass_on  # noqa: N815

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *arguments: Any) -> None:
                return  # who asked has gone

        self.server = Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
