"""A small OpenAI-compatible server on the loopback interface, for tests: answers come from a Python function.

    with serve(lambda messages, body: "hello") as server:
        RemoteModel(server.url, "any-name").sample(...)
        server.requests                                     # what was asked, in order of arrival

`reply(messages, body)` returns one text (used for all n choices), a list of texts (exactly these choices) or a Fault.
`base` is where the API lives on the server; any other path gets `nowhere`.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Fault:
    """A way to fail. kind: "status" (an error reply with `status`, `message` and perhaps a Retry-After or a Location
    header), "raw" (200 with `message` as the whole body), "page" (the same with `status`), "empty" (no choices), "null"
    (a choice whose content is null and whose finish_reason is `finish`), "hang" (no answer until the server ends),
    "close" (the connection is cut)."""

    kind: str = "status"
    status: int = 500
    message: str = "the server is on fire"
    retry_after: str = ""
    finish: str = "stop"
    location: str = ""


Reply = str | list[str] | Fault


@dataclass
class Server:
    """What the test sees: the URL, and the log of requests as {"body", "key", "path", "headers"}."""

    url: str
    requests: list[dict[str, Any]] = field(default_factory=list)
    busy: int = 0  # chat requests in flight now
    most_busy: int = 0  # and the most there ever were
    lock: threading.Lock = field(default_factory=threading.Lock)


def completion(texts: list[str | None], finish: list[str], body: dict[str, Any]) -> dict[str, Any]:
    """A chat completion object; its usage counts white-space separated words."""
    prompt = sum(len(str(message["content"]).split()) for message in body["messages"])
    written = sum(len((text or "").split()) for text in texts)
    choices = [{"index": i, "message": {"role": "assistant", "content": text}, "finish_reason": why}
               for i, (text, why) in enumerate(zip(texts, finish))]
    usage = {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}
    return {"id": "chatcmpl-0", "object": "chat.completion", "created": 0, "model": body.get("model"),
            "choices": choices, "usage": usage}


def cut(text: str, limit: int | None) -> tuple[str, str]:
    """The text and its finish reason under a limit of `limit` words.

    >>> cut("a b c", 2), cut("a b c", 3)
    (('a b', 'length'), ('a b c', 'stop'))
    """
    words = text.split()
    return (" ".join(words[:limit]), "length") if limit is not None and len(words) > limit else (text, "stop")


def handler(server: Server, reply: Callable[[list, dict], Reply], models: tuple[str, ...], over: threading.Event,
            base: str, nowhere: Fault) -> type[BaseHTTPRequestHandler]:
    """The request handler of `serve`; setting `over` lets go of the requests that hang."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # connections stay open between requests, as with real servers
        disable_nagle_algorithm = True  # or the body waits 40 ms for the headers to be acknowledged

        def log_message(self, *_: Any) -> None:
            pass

        def send(self, status: int, content: bytes, **headers: str) -> None:
            self.send_response(status)
            headers = {"Content-Type": "application/json", "Content-Length": str(len(content)), **headers}
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def note(self, body: dict[str, Any]) -> None:
            key = self.headers.get("Authorization", "").removeprefix("Bearer ")
            with server.lock:
                server.requests.append({"path": self.path, "body": body, "key": key, "headers": dict(self.headers)})

        def route(self) -> str:
            """The path without the query; a proxy is sent the whole URL."""
            path = self.path.partition("?")[0]
            return "/" + path.split("/", 3)[3] if "://" in path else path

        def do_GET(self) -> None:
            self.note({})
            if self.route() != f"{base}/models":
                return self.fail(nowhere, {})
            self.send(200, json.dumps({"object": "list", "data": [{"id": name} for name in models]}).encode())

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.note(body)
            if self.route() != f"{base}/chat/completions":
                return self.fail(nowhere, body)
            with server.lock:
                server.busy += 1
                server.most_busy = max(server.most_busy, server.busy)
            try:
                answer = reply(body["messages"], body)
            finally:
                with server.lock:
                    server.busy -= 1
            if isinstance(answer, Fault):
                return self.fail(answer, body)
            texts = [answer] * (body.get("n") or 1) if isinstance(answer, str) else answer
            limit = body.get("max_completion_tokens", body.get("max_tokens"))
            cuts = [cut(text, limit) for text in texts]
            content = completion([text for text, _ in cuts], [why for _, why in cuts], body)
            self.send(200, json.dumps(content).encode())

        def fail(self, fault: Fault, body: dict[str, Any]) -> None:
            if fault.kind == "hang":
                over.wait()
            if fault.kind in ("hang", "close"):
                self.close_connection = True
            elif fault.kind == "raw":
                self.send(200, fault.message.encode())
            elif fault.kind == "page":
                self.send(fault.status, fault.message.encode())
            elif fault.kind == "empty":
                self.send(200, json.dumps(completion([], [], body)).encode())
            elif fault.kind == "null":
                self.send(200, json.dumps(completion([None], [fault.finish], body)).encode())
            elif fault.kind == "status":
                headers = {"Retry-After": fault.retry_after} if fault.retry_after else {}
                if fault.location:
                    headers["Location"] = fault.location
                self.send(fault.status, json.dumps({"error": {"message": fault.message}}).encode(), **headers)
            else:
                raise ValueError(f"no such fault: {fault.kind!r}")

    return Handler


NOWHERE = Fault(status=404, message="no such path")


@contextmanager
def serve(reply: Callable[[list, dict], Reply], models: tuple[str, ...] = ("test-model",), base: str = "/v1",
          nowhere: Fault = NOWHERE) -> Iterator[Server]:
    """Answer `reply(messages, body)` at server.url until the block ends."""
    server, over = Server(""), threading.Event()
    http = ThreadingHTTPServer(("127.0.0.1", 0), handler(server, reply, models, over, base, nowhere))
    http.daemon_threads = True
    server.url = f"http://127.0.0.1:{http.server_address[1]}{base}"
    thread = threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        over.set()
        http.shutdown()
        http.server_close()
        thread.join()
