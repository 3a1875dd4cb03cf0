"""RemoteModel against a local HTTP server that answers, stumbles, lies and falls silent.

What servers do, and what happens then, stands in three tables: ANSWERS (one answer among good ones), ROUTES (where the
API lives) and DEAD (a server of which nothing comes). `python tests/test_remote.py` prints them as Markdown.
"""

from __future__ import annotations

import json
import logging
import pickle
import random
import re
import ssl
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime

import pytest
from server import NOWHERE, Fault, Reply, serve

import evolve
import lse
from lse import RemoteModel

KEY = "sk-a-secret/that+nobody=may-see"
CONTEXT = ssl.create_default_context()


@pytest.fixture(autouse=True)
def no_inherited_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """No key and no proxy but the test's own."""
    for name in ("LSE_API_KEY", "LSE_SOLVER_API_KEY", "LSE_EDITOR_API_KEY", "OPENAI_API_KEY", "HTTP_PROXY",
                 "http_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    if lse.httpx.__name__ == "httpx2":
        monkeypatch.setattr("httpcore2.default_ssl_context", lambda **_: CONTEXT)  # 60 ms for each model otherwise


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}]


def remote(url: str, **options) -> RemoteModel:
    """A model whose pauses are too short to notice and whose patience ends after two more tries."""
    return RemoteModel(url, **{"model": "m", "timeout": 30.0, "retries": 2, "backoff": 0.001, **options})


def echo(messages: list, body: dict) -> str:
    return "echo " + messages[-1]["content"]


def first_fault(*faults: Reply):
    """A reply function that stumbles over `faults`, one per request, and then recovers."""
    left, lock = list(faults), threading.Lock()

    def reply(messages: list, body: dict) -> Reply:
        with lock:
            return left.pop(0) if left else echo(messages, body)

    return reply


def raw(**content) -> Fault:
    """A 200 with this JSON."""
    return Fault("raw", message=json.dumps(content))


def choice(content, finish: str | None = "stop", **message) -> Fault:
    """A 200 with one choice of this content and finish reason."""
    return raw(choices=[{"message": {"content": content, **message}, "finish_reason": finish}])


def page(status: int, message: str) -> Fault:
    return Fault("page", status=status, message=message)


def refusal(status: int, **error) -> Fault:
    """OpenAI's shape of an error."""
    return Fault("page", status=status, message=json.dumps({"error": error}))


# -- table 1: one answer among good ones ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """What a server does to one of three prompts, and what becomes of that answer; the others are always answered."""

    name: str  # what the server does
    sends: Reply | tuple[Reply, ...]  # always, or these once and then an answer
    text: str = ""
    cut: bool = False
    error: str = ""  # a part of it; "" if the answer did not fail
    requests: int = 1
    shown: str = ""  # what is sent, for readers, where the JSON itself is too long


THINKING = [{"type": "thinking", "thinking": [{"type": "text", "text": "2 + 2 ..."}]}, {"type": "text", "text": "4"}]
VLLM = ("This model's maximum context length is 4096 tokens. However, you requested 5000 tokens (4488 in the messages, "
        "512 in the completion). Please reduce the length of the messages or completion. (parameter=max_tokens)")
VLLM_NEW = ("'max_tokens' or 'max_completion_tokens' is too large: 512. This model's maximum context length is 4096 "
            "tokens and your request has 3900 input tokens (512 > 4096 - 3900). None")
NGINX = "<html><head><title>502 Bad Gateway</title></head><body><hr>nginx</body></html>"
FASTAPI = {"detail": [{"type": "string_too_long", "loc": ["body", "messages"], "msg": "String too long"}]}
GEMINI = [{"error": {"code": 400, "message": "The input token count (9999) exceeds the maximum", "status": "INVALID"}}]
ROUTER = {"code": 502, "message": "Provider returned error", "metadata": {"raw": "the GPU fell off the bus"}}
FLAGGED = "The response was filtered due to the prompt triggering our content management policy."

ANSWERS = [
    Shape("a plain answer is taken", choice("fine"), "fine"),
    Shape("text in parts is joined and the thinking left out", choice(THINKING), "4"),
    Shape("parts that are strings are joined", choice(["fi", "ne"]), "fine"),
    Shape("thinking without text is no answer", choice(THINKING[:1]), error="no text"),
    Shape("a model that thinks to the limit is cut", choice(None, "length"), cut=True),
    Shape("thinking parts up to the limit are cut", choice(THINKING[:1], "length"), cut=True),
    Shape("null content fails", choice(None), error="no text"),
    Shape("content that is a number fails", choice(7), error="no text"),
    Shape("empty content is an empty answer", choice("")),
    Shape("a null message is asked for again and fails", raw(choices=[{"message": None}]), error="200", requests=3),
    Shape("no choices are asked for again and fail", raw(choices=[]), error="'choices': []", requests=3),
    Shape("choices that are numbers are asked for again and fail", raw(choices=[7]), error="[7]", requests=3),
    Shape("a choice without a message is asked for again and fails", raw(choices=[{"text": "old"}]), error="old",
          requests=3),
    Shape("an error inside a 200 is asked for again and fails", raw(error={"message": "lunch break"}),
          error="lunch break", requests=3),
    Shape("an error inside a 200 that passes is survived", (raw(error="lunch break"),), "echo odd", requests=2),
    Shape("an error inside a 200 counts as its code says", raw(error={"message": "flagged", "code": 400}),
          error="flagged"),
    Shape("an error inside a choice is asked for again and fails",
          raw(choices=[{"error": ROUTER, "message": {"content": "half"}, "finish_reason": "error"}]),
          error="the GPU fell off the bus", requests=3),
    Shape("HTML in a 200 is asked for again and fails", Fault("raw", message="<p>lunch <b>break</b></p>"),
          error="lunch break", requests=3),
    Shape("JSON that breaks off is asked for again and fails", Fault("raw", message='{"choices": [{"mess'),
          error="mess", requests=3),
    Shape("JSON too deep to read is asked for again and fails", Fault("raw", message="[" * 10**5), error="200",
          requests=3, shown="100,000 times ["),
    Shape("an empty body is asked for again and fails", Fault("raw", message=""), error="an empty reply", requests=3,
          shown="200 and nothing"),
    Shape("empty lines before the answer do no harm", Fault("raw", message="\n\n\n" + choice("fine").message), "fine"),
    Shape("a closed connection is asked for again and fails", Fault("close"), error="no answer", requests=3,
          shown="the connection is cut"),
    Shape("a closed connection that passes is survived", (Fault("close"),), "echo odd", requests=2,
          shown="the connection is cut, once"),
    Shape("a 500 that stays fails", Fault(status=500, message="boiler exploded"), error="500: boiler exploded",
          requests=3),
    Shape("a 500 that passes is survived", (Fault(status=500), Fault(status=503)), "echo odd", requests=3,
          shown="a 500, then a 503"),
    Shape("a 429 that passes is survived", (Fault(status=429, retry_after="0.01"),), "echo odd", requests=2,
          shown="429, Retry-After: 0.01"),
    Shape("a gateway's page is told without its tags", page(502, NGINX), error="502: 502 Bad Gateway nginx",
          requests=3),
    Shape("vLLM's prompt too long fails and keeps max_tokens", refusal(400, message=VLLM, code=400),
          error="maximum context length"),
    Shape("vLLM's newer prompt too long fails and keeps max_tokens", refusal(400, message=VLLM_NEW),
          error="maximum context length"),
    Shape("OpenAI's prompt too long fails", refusal(400, message="Your input exceeds the context window",
                                                    code="context_length_exceeded"), error="exceeds the context"),
    Shape("Anthropic's prompt too long fails", refusal(400, type="invalid_request_error", message="prompt is too long: "
                                                       "216854 tokens > 200000 maximum"), error="prompt is too long"),
    Shape("Gemini's list of one error fails", page(400, json.dumps(GEMINI)), error="400: The input token count"),
    Shape("a 413 fails", page(413, "<h1>413 Request Entity Too Large</h1>"), error="413 Request Entity Too Large"),
    Shape("FastAPI's 422 fails", page(422, json.dumps(FASTAPI)), error="String too long"),
    Shape("a 451 fails", refusal(451, message="not in your country"), error="not in your country"),
    Shape("Azure's content filter fails", refusal(400, message=FLAGGED, code="content_filter", param="prompt"),
          error="content management"),
    Shape("a filter that speaks of temperature costs no setting", refusal(400, message="flagged: 'what temperature'"),
          error="flagged", requests=2),
    Shape("a content filter in the finish reason fails", choice("half an ans", "content_filter"),
          error="content_filter"),
    Shape("Google's SAFETY fails", choice(None, "SAFETY"), error="safety"),
    Shape("a refusal in words of its own fails", choice(None, refusal="I cannot help"), error="I cannot help"),
    Shape("a finish reason that nobody knows fails", choice("half", "moonrise"), error="moonrise"),
    Shape("a finish reason that is an object fails", choice("half", {"type": "odd"}), error="odd"),
    Shape("the finish reason error is asked for again and fails", choice("half", "error"), error="half", requests=3),
    *[Shape(f"finish reason {reason} is complete", choice("fine", reason), "fine")
      for reason in ("stop", "STOP", "end_turn", "eos", "stop_sequence", "tool_calls", None)],
    Shape("a tool call without text fails", choice(None, "tool_calls"), error="tool_calls"),
    *[Shape(f"finish reason {reason} is cut", choice("half", reason), "half", cut=True)
      for reason in ("length", "max_tokens", "MAX_TOKENS", "model_length")],
    Shape("a firewall's 403 on one prompt fails", page(403, "<title>Blocked: SQL injection</title>"),
          error="Blocked: SQL injection"),
    Shape("a 404 out of the blue fails", Fault(status=404, message="pod is gone"), error="pod is gone"),
    Shape("a redirect of one prompt fails", Fault(status=307, location="http://elsewhere/v1"), error="http://elsewhere"),
    Shape("a 201 with an answer is an answer", page(201, choice("fine").message), "fine"),
    Shape("a 304 of one prompt fails", page(304, ""), error="304"),
    Shape("an error in bytes that are no text fails", Fault("page", status=400, message="\x00\x7f"), error="400"),
    Shape("half a UTF-16 pair becomes a question mark", choice("bad \ud800 good"), "bad ? good",
          shown="bad \\ud800 good"),
    Shape("token counts of any shape do no harm",
          raw(choices=[{"message": {"content": "fine"}}], usage={"prompt_tokens": "many", "completion_tokens": None}),
          "fine"),
    Shape("a usage that is a list does no harm", raw(choices=[{"message": {"content": "fine"}}], usage=[1]), "fine"),
]


@pytest.mark.parametrize("shape", ANSWERS, ids=lambda shape: shape.name)
def test_one_answer(shape: Shape) -> None:
    """A prompt is answered, the odd one meets the shape, a third is answered: one sample never ends the batch."""
    odd = shape.sends if isinstance(shape.sends, tuple) else (shape.sends,) * 9
    stumble = first_fault(*odd)

    def reply(messages: list, body: dict) -> Reply:
        return stumble(messages, body) if messages[-1]["content"] == "odd" else echo(messages, body)

    with serve(reply) as server, warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # no setting is dropped
        model = remote(server.url, concurrency=1)
        [[before], [sample], [after]] = model.sample([ask("a"), ask("odd"), ask("b")])
    assert [before.text, after.text] == ["echo a", "echo b"] and not before.error and not after.error
    assert (sample.text, sample.truncated) == (shape.text, shape.cut)
    assert sample.ids is sample.prompt_ids is None
    assert shape.error in sample.error and bool(sample.error) == bool(shape.error) and len(sample.error) <= 400
    assert len(server.requests) == 2 + shape.requests
    assert (model.usage.answers, model.usage.failed, model.usage.cut) == (3, bool(shape.error), shape.cut)
    assert model.dropped == {} and server.requests[-1]["body"]["max_tokens"] == 512


# -- table 2: where the API lives -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Route:
    name: str
    base: str  # where the API is
    given: str  # what the user gives, after http://host
    asked: tuple[str, ...]  # the paths of two requests, one after the other
    nowhere: Fault = NOWHERE  # what any other path gets


CHAT = "/v1/chat/completions"
AZURE = "/openai/deployments/gpt"
WRONG_ROUTE = raw(error="Unexpected endpoint or method. (POST /chat/completions)")

ROUTES = [
    Route("a URL that ends in v1 is used as given", "/v1", "/v1", (CHAT, CHAT)),
    Route("a slash at the end does no harm", "/v1", "/v1/", (CHAT, CHAT)),
    Route("the whole route may be given", "/v1", CHAT, (CHAT, CHAT)),
    Route("the whole route and a slash may be given", "/v1", CHAT + "/", (CHAT, CHAT)),
    Route("v1 is tried where there is no such route", "/v1", "", ("/chat/completions", CHAT, CHAT)),
    Route("and found behind a slash", "/v1", "/", ("/chat/completions", CHAT, CHAT)),
    Route("v1 is tried after a 405", "/v1", "", ("/chat/completions", CHAT, CHAT), page(405, "")),
    Route("v1 is tried after LM Studio's 200", "/v1", "", ("/chat/completions", CHAT, CHAT), WRONG_ROUTE),
    Route("v1 is tried after a web page", "/v1", "", ("/chat/completions", CHAT, CHAT), page(200, "<h1>Hello</h1>")),
    Route("Gemini's v1beta/openai is used as given", "/v1beta/openai", "/v1beta/openai",
          ("/v1beta/openai/chat/completions",) * 2),
    Route("GLM's v4 is used as given", "/api/paas/v4", "/api/paas/v4/", ("/api/paas/v4/chat/completions",) * 2),
    Route("a server without v1 is used as given", "", "", ("/chat/completions",) * 2),
    Route("Azure's query stays on every request", AZURE, AZURE + "?api-version=2024-10-21",
          (AZURE + "/chat/completions?api-version=2024-10-21",) * 2),
    Route("Azure's whole route and query may be given", AZURE, AZURE + "/chat/completions?api-version=2024-10-21",
          (AZURE + "/chat/completions?api-version=2024-10-21",) * 2),
    Route("a query stays where v1 is tried", "/v1", "?tier=2", ("/chat/completions?tier=2", *[CHAT + "?tier=2"] * 2)),
]


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.name)
def test_one_route(route: Route) -> None:
    with serve(echo, base=route.base, nowhere=route.nowhere) as server:
        model = remote(server.url.removesuffix(route.base) + route.given)
        texts = [model.sample([ask("a")])[0][0].text for _ in range(2)]
    assert texts == ["echo a"] * 2
    assert [request["path"] for request in server.requests] == [*route.asked]


@pytest.mark.parametrize("tail", ["", "/", "/v1", "/v1/", "/v1/chat/completions"])
def test_the_models_are_listed_over_the_same_route(tail: str) -> None:
    with serve(echo) as server:
        model = remote(server.url.removesuffix("/v1") + tail, model=None)
        assert model.model == "test-model" and model.base_url == server.url
        assert model.sample([ask("a")])[0][0].text == "echo a"
    tried = [] if "v1" in tail else ["/models"]
    assert [request["path"] for request in server.requests] == [*tried, "/v1/models", "/v1/chat/completions"]


def test_where_there_is_no_route_both_are_named() -> None:
    neither = pytest.raises(ConnectionError, match=r"/paas/chat/completions: 404: no such path; .*/paas/v1/chat/compl")
    with serve(echo, base="/elsewhere") as server, neither:
        remote(server.url.replace("elsewhere", "paas")).sample([ask("a")] * 50)
    assert len(server.requests) <= 2 * 16, "nobody asks 50 times"
    with serve(echo, base="/elsewhere") as server, pytest.raises(ConnectionError, match="/paas/models: 404.*v1/models"):
        remote(server.url.replace("elsewhere", "paas"), model=None)


def test_while_a_server_loads_its_route_stays_open() -> None:
    """A 503 says nothing about the route, and neither does an odd 200: /v1 is found afterwards."""
    with serve(first_fault(Fault(status=503), raw(error="loading"))) as server:
        [[sample]] = remote(server.url.removesuffix("/v1")).sample([ask("a")])
    assert sample.text == "echo a" and len(server.requests) == 6


# -- table 3: nothing comes -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dead:
    """A server that does this to every request of a batch of 40, one at a time."""

    name: str
    sends: Fault
    error: str
    requests: int  # before the batch is given up


DEAD = [
    Dead("a wrong key ends a batch at once", refusal(401, message="Incorrect API key"), "401: Incorrect API key", 1),
    Dead("a 403 from the start ends a batch at once", refusal(403, message="no access"), "403: no access", 1),
    Dead("an unknown model ends a batch at once", refusal(404, message="The model `m` does not exist."),
         "The model `m` does not exist", 1),
    Dead("an empty account ends a batch at once", refusal(402, message="Insufficient Balance"), "Insufficient", 1),
    Dead("a server that has moved ends a batch at once", Fault(status=308, location="https://new.host/v1"),
         "moved to https://new.host/v1", 1),
    Dead("a server that stumbles over everything is given up after 8 answers", Fault(status=500, message="no GPU"),
         "500: no GPU", 8 * 3 + 1),
    Dead("a server that cuts every connection is given up after 8 answers", Fault("close"), "no answer", 8 * 3 + 1),
    Dead("a server that speaks HTML is given up after 8 answers", Fault("raw", message="<b>hi</b>"), "hi", 8 * 3 + 1),
    Dead("a used-up quota is given up after 8 answers", refusal(429, message="You exceeded your current quota"),
         "exceeded your current quota", 8 * 3 + 1),
    Dead("a server that refuses everything is asked for everything once", refusal(400, message="because of the moon"),
         "because of the moon", 40 + 1),
    Dead("a filter of everything is asked for everything once", choice(None, "content_filter"), "content_filter",
         40 + 1),
]


@pytest.mark.parametrize("dead", DEAD, ids=lambda dead: dead.name)
def test_nothing_comes(dead: Dead) -> None:
    """The last request is a plain "Hello", unless the server's words leave no doubt."""
    up = pytest.raises(ConnectionError, match="What to do: see that the server is up(?s:.*)model name.*LSE_API_KEY")
    with serve(lambda messages, body: dead.sends) as server, up as caught:
        remote(server.url, concurrency=1).sample([ask("a")] * 40)
    assert dead.error in str(caught.value) and server.url in str(caught.value)
    assert len(server.requests) == dead.requests
    assert (server.requests[-1]["body"]["messages"] == lse.HELLO) == (dead.requests > 1)


def test_a_dead_server_costs_a_batch_of_thousands_little() -> None:
    with serve(lambda messages, body: Fault()) as server, pytest.raises(ConnectionError, match="on fire"):
        remote(server.url).sample([ask("a")] * 3000)
    assert len(server.requests) < 150


def test_prompts_that_break_the_server_do_not_end_the_batch() -> None:
    """Twenty in a row, as when a new version of the instructions is too much for a server that says 500 to that."""
    def reply(messages: list, body: dict) -> Reply:
        return Fault() if "poison" in messages[-1]["content"] else echo(messages, body)

    with serve(reply) as server:
        model = remote(server.url, concurrency=1)
        rows = model.sample([*[ask("poison")] * 20, ask("b")])
    assert [row[0].text for row in rows] == [""] * 20 + ["echo b"] and "on fire" in rows[3][0].error
    assert (model.usage.answers, model.usage.failed) == (21, 20)
    assert len(server.requests) == 20 * 3 + 2 + 1, "twice it was asked whether it is there"


def test_a_batch_of_refused_prompts_is_no_end_while_the_server_answers() -> None:
    """One edit that grew too long is a whole batch in a run with one tree."""
    def reply(messages: list, body: dict) -> Reply:
        return Fault(status=400, message="prompt is too long") if "long" in messages[-1]["content"] else "hi"

    with serve(reply) as server:
        model = remote(server.url)
        [row] = model.sample([ask("long")], n=5)
    assert [sample.error for sample in row] == ["400: prompt is too long"] * 5 and len(server.requests) == 6
    assert model.usage.failed == model.usage.answers == 5


def test_a_key_that_expires_ends_the_batch() -> None:
    """Otherwise the rest of the answers would count as wrong."""
    answers = first_fault(*["fine"] * 5, *[Fault(status=401, message="expired")] * 90)
    with serve(answers) as server, pytest.raises(ConnectionError, match="401: expired"):
        remote(server.url, concurrency=1).sample([ask("a")] * 40)
    assert len(server.requests) == 6


def test_a_server_that_goes_away_ends_the_batch() -> None:
    answers = first_fault(*["fine"] * 5, *[Fault(status=404, message="no such model any more")] * 90)
    with serve(answers) as server, pytest.raises(ConnectionError, match="no such model any more"):
        remote(server.url, concurrency=1).sample([ask("a")] * 40)
    assert len(server.requests) == 5 + 8 + 1


def as_markdown() -> str:
    """The three tables, for readers."""
    def show(sends: Reply | tuple[Reply, ...]) -> str:
        if isinstance(sends, tuple):
            return "first " + ", then ".join(map(show, sends))
        if isinstance(sends, str):
            return sends
        status = 200 if sends.kind == "raw" else sends.status
        more = f" Location: {sends.location}" if sends.location else ""
        text = sends.message if len(sends.message) <= 200 else sends.message[:197] + "..."
        if sends.kind == "close":
            return "the connection is cut"
        return f"{status} `{text.strip()}`{more}".replace("|", "\\|")

    lines = ["| One answer among good ones | What the server sends | What happens | Requests |", "|---|---|---|---|"]
    for shape in ANSWERS:
        happens = f'{"cut" if shape.cut else "answer"}: "{shape.text}"'
        if shape.error:
            happens = f'failed: "{shape.error}"'
        lines.append(f"| {shape.name} | {shape.shown or show(shape.sends)} | {happens} | {shape.requests} |")
    lines += ["", "| Where the API lives | Given | Found at | Paths of two requests |", "|---|---|---|---|"]
    for route in ROUTES:
        found = f"`http://host{route.given}` | `http://host{route.base}`"
        lines.append(f"| {route.name} | {found} | {', '.join(route.asked)} |")
    lines += ["", "| Nothing comes, of 40 | What the server sends | The error says | Requests |", "|---|---|---|---|"]
    for dead in DEAD:
        lines.append(f"| {dead.name} | {show(dead.sends)} | \"{dead.error}\" | {dead.requests} |")
    return "\n".join(lines)


def test_the_tables_can_be_printed() -> None:
    table = as_markdown()
    assert all(row.name in table for row in [*ANSWERS, *ROUTES, *DEAD])
    assert len({row.name for row in [*ANSWERS, *ROUTES, *DEAD]}) == len(ANSWERS) + len(ROUTES) + len(DEAD)


# -- what is sent, and what comes back --------------------------------------------------------------------------------


def test_samples_have_text_and_no_ids() -> None:
    with serve(echo) as server:
        [[sample]] = remote(server.url).sample([ask("größe 大きさ")])
    assert sample.text == "echo größe 大きさ" and not sample.truncated and sample.ids is sample.prompt_ids is None


def test_the_request_holds_the_chat_and_the_settings() -> None:
    with serve(echo) as server:
        model = remote(server.url, extra={"presence_penalty": 0.5})
        model.sample([ask("a")], max_new_tokens=7, temperature=0.7, top_p=0.8, top_k=20)
        model.sample([ask("a")], temperature=0)
    full, plain = (request["body"] for request in server.requests)
    assert full == {"model": "m", "messages": ask("a"), "max_tokens": 7, "temperature": 0.7, "top_p": 0.8,
                    "top_k": 20, "presence_penalty": 0.5, "stream": False}
    assert "top_k" not in plain and plain["temperature"] == 0 and plain["max_tokens"] == 512


def test_extra_fields_win_and_none_is_not_sent() -> None:
    with serve(echo) as server:
        remote(server.url, extra={"temperature": None, "max_tokens": 9}).sample([ask("a")])
    assert server.requests[0]["body"] == {"model": "m", "messages": ask("a"), "max_tokens": 9, "top_p": 1.0,
                                          "stream": False}


def test_the_first_listed_model_is_the_default() -> None:
    with serve(echo, models=("first", "second")) as server:
        remote(server.url, model=None).sample([ask("a")])
    assert server.requests[-1]["body"]["model"] == "first"
    with serve(echo, models=()) as server, pytest.raises(ConnectionError, match="no models are listed"):
        remote(server.url, model=None)


def test_finish_reason_length_is_truncated() -> None:
    with serve(lambda messages, body: messages[-1]["content"]) as server:
        [[long], [short]] = remote(server.url).sample([ask("one two three"), ask("four")], max_new_tokens=2)
    assert (long.text, long.truncated) == ("one two", True) and (short.text, short.truncated) == ("four", False)


def test_a_key_in_an_answer_is_not_kept_and_an_ordinary_word_is() -> None:
    with serve(lambda messages, body: f"Bearer {KEY} EMPTY") as server:
        assert remote(server.url, api_key=KEY).sample([ask("a")])[0][0].text == "Bearer *** EMPTY"
        assert "EMPTY" in remote(server.url, api_key="EMPTY").sample([ask("a")])[0][0].text


def test_n_samples_of_each_chat_in_order() -> None:
    """The later a chat, the sooner it is answered; the samples still come in the order of the chats."""
    def reply(messages: list, body: dict) -> str:
        number = int(messages[-1]["content"])
        time.sleep(0.05 * (4 - number))
        return f"{number}.{random.random()}"

    with serve(reply) as server:
        answers = remote(server.url).sample([ask(str(i)) for i in range(5)], n=3)
    assert [[sample.text[:2] for sample in row] for row in answers] == [[f"{i}."] * 3 for i in range(5)]
    assert len({sample.text for row in answers for sample in row}) == 15, "each is a sample of its own"


@pytest.mark.parametrize("texts", [["one"], ["one"] * 9])
def test_a_server_with_its_own_idea_of_n(texts: list[str]) -> None:
    """Some servers ignore n, some refuse it, some (here) send what they please: it is not used."""
    with serve(lambda messages, body: texts) as server:
        assert [len(row) for row in remote(server.url).sample([ask("a"), ask("b")], n=5)] == [5, 5]
    assert len(server.requests) == 10 and not any("n" in request["body"] for request in server.requests)


def test_no_chats() -> None:
    with serve(echo) as server:
        assert remote(server.url).sample([], n=3) == [] and remote(server.url).sample([ask("a")], n=0) == [[]]
    assert not server.requests


def test_answers_and_tokens_are_counted() -> None:
    """`ask` has 2 + 1 words; "echo a" has 2. What is asked for again counts once; what failed costs tokens as well."""
    filtered = raw(choices=[{"message": {"content": None}, "finish_reason": "content_filter"}],
                   usage={"prompt_tokens": 100, "completion_tokens": 1})
    with serve(first_fault(filtered, Fault())) as server:
        model = remote(server.url, concurrency=1)
        model.sample([ask("a"), ask("b")], n=4)
        assert vars(model.usage) == {"answers": 8, "failed": 1, "cut": 0, "unreadable": 0, "lenient": 0,
                                     "tokens_read": 100 + 7 * 3, "tokens_written": 1 + 7 * 2}
        model.sample([ask("a"), ask("b")], max_new_tokens=1)
    assert (model.usage.answers, model.usage.failed, model.usage.cut) == (10, 1, 2)


def test_counts_do_not_race(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading the counters is made slow, so that without the lock two threads add to the same old value."""
    class Slow(lse.Usage):
        def __getattribute__(self, name: str):
            count = super().__getattribute__(name)
            if name in ("answers", "tokens_read"):
                time.sleep(0.005 if name == "answers" else 0.001)
            return count

    monkeypatch.setattr(lse, "Usage", Slow)
    with serve(echo) as server:
        model = remote(server.url, concurrency=8)
        model.sample([ask("a")] * 40)
    assert (model.usage.answers, model.usage.tokens_read, model.usage.tokens_written) == (40, 120, 80)


@pytest.mark.parametrize("bound", [1, 3])
def test_requests_in_flight_are_bounded(bound: int) -> None:
    """Each answer waits for `bound` requests at once, so fewer would time out; and there are never more."""
    together = threading.Barrier(bound)

    def reply(messages: list, body: dict) -> str:
        together.wait(timeout=20)
        time.sleep(0.02)
        return "all here"

    with serve(reply) as server:
        remote(server.url, concurrency=bound, timeout=30).sample([ask("a")] * 9)
    assert server.most_busy == bound


# -- failures ---------------------------------------------------------------------------------------------------------

PASSING = {
    "429": Fault(status=429, message="slow down, please"),
    "500": Fault(status=500, message="boiler exploded"),
    "503": Fault(status=503, message="model is loading"),
    "nonsense": Fault("raw", message="<html>lunch break</html>"),
    "a list": Fault("raw", message='["lunch break"]'),
    "an error in a 200": Fault("raw", message='{"error": {"message": "lunch break"}}'),
    "choices of numbers": Fault("raw", message='{"choices": [7], "lunch": "break"}'),
    "no message": Fault("raw", message='{"choices": [{"text": "lunch break"}]}'),
    "nothing": Fault("raw", message=""),
    "no choices": Fault("empty"),
    "closed": Fault("close"),
}
SAID = {"429": "slow down, please", "500": "boiler exploded", "503": "model is loading", "nonsense": "lunch break",
        "an error in a 200": "lunch break", "no choices": "'choices': []"}


@pytest.mark.parametrize("name", PASSING)
def test_what_may_pass_is_tried_again(name: str) -> None:
    with serve(first_fault(PASSING[name], PASSING[name])) as server:
        assert remote(server.url).sample([ask("a")])[0][0].text == "echo a"
    assert len(server.requests) == 3


@pytest.mark.parametrize("name", PASSING)
def test_what_does_not_pass_ends_in_an_error_that_says_why(name: str) -> None:
    up = pytest.raises(ConnectionError, match="What to do: see that the server is up")
    with serve(lambda messages, body: PASSING[name]) as server, up as caught:
        remote(server.url).sample([ask("a")])
    assert len(server.requests) == 3 + 1, "retries are bounded: one try and two more, and one hello"
    assert SAID.get(name, "") in str(caught.value) and server.url in str(caught.value)


def test_the_servers_message_is_kept_short() -> None:
    with serve(lambda messages, body: Fault(message="x" * 10**6)) as server, pytest.raises(ConnectionError) as caught:
        remote(server.url).sample([ask("a")])
    assert 400 < len(str(caught.value)) < 1000


@pytest.mark.parametrize("body", ["null", '"Unauthorized"', "[1]", "[]", '{"errors": 5}', '{"error": null}', "7",
                                  '{"choices": 5}', '{"error": [1]}', "<p>Unauthorized</p>", "", "{", "\\ud800"])
def test_error_bodies_of_any_shape(body: str) -> None:
    """The status survives them all."""
    refused = pytest.raises(ConnectionError, match="401.*(?s:.*)LSE_API_KEY")
    with serve(lambda messages, asked: page(401, body)) as server, refused:
        remote(server.url).sample([ask("a")])
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_what_cannot_pass_is_not_tried_again(status: int) -> None:
    """A refusal may be about the prompt: then the server is asked whether it answers anything at all."""
    refused = pytest.raises(ConnectionError, match=f"{status}.*because of the moon(?s:.*)model name.*LSE_API_KEY")
    with serve(lambda messages, body: Fault(status=status, message="no, because of the moon")) as server, refused:
        remote(server.url).sample([ask("a")])
    asked = [request["body"]["messages"] for request in server.requests]
    assert asked == [ask("a"), lse.HELLO][: 2 if status in (400, 422) else 1]


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that are asked for, none of which is made."""
    asked: list[float] = []
    real = RemoteModel._pause

    def pause(*arguments) -> float:
        asked.append(real(*arguments))
        return 0.0

    monkeypatch.setattr(RemoteModel, "_pause", pause)
    return asked


@pytest.mark.parametrize("after, seconds", [("7", 7), ("1.5", 1.5), ("0.25", 0.25)])
def test_retry_after_is_honoured(pauses: list[float], after: str, seconds: float) -> None:
    with serve(first_fault(Fault(status=429, retry_after=after))) as server:
        remote(server.url).sample([ask("a")])
        remote(server.url).sample([ask("a")])
    assert pauses == [seconds]


def test_retry_after_may_be_a_date(pauses: list[float]) -> None:
    date = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=30), usegmt=True)
    with serve(first_fault(Fault(status=503, retry_after=date))) as server:
        remote(server.url).sample([ask("a")])
    assert len(pauses) == 1 and 20 < pauses[0] <= 30


@pytest.mark.parametrize("after", ["soon", "Wed, 21 Oct 2015 07:28:00 GMT", "-5", "nan", "inf", "1e9", "1.", "7 s",
                                   "Wed, 99 Oct 2015", "٣"])
def test_an_odd_retry_after_is_ignored(pauses: list[float], after: str) -> None:
    assert lse.retry_after(after) == 0
    if after.isascii():
        with serve(first_fault(Fault(status=429, retry_after=after))) as server:
            assert remote(server.url).sample([ask("a")])[0][0].text == "echo a"
        assert len(pauses) == 1 and pauses[0] < 0.01


def test_pauses_double_and_jitter(pauses: list[float]) -> None:
    with serve(lambda messages, body: Fault()) as server, pytest.raises(ConnectionError):
        remote(server.url, backoff=1.0, retries=5).sample([ask("a")])
    assert len(pauses) == 5, "none after the last try"
    assert all(0.5 * 2**i <= pause <= 1.5 * 2**i for i, pause in enumerate(pauses))
    assert len({pause / 2**i for i, pause in enumerate(pauses)}) == 5


@pytest.mark.parametrize("after", ["86400", "Wed, 21 Oct 2215 07:28:00 GMT", "9" * 400])
def test_nobody_waits_longer_than_a_minute(pauses: list[float], after: str) -> None:
    slow = Fault(status=429, retry_after=after)
    with serve(lambda messages, body: slow) as server, pytest.raises(ConnectionError):
        remote(server.url).sample([ask("a")])
    assert pauses == [60.0, 60.0], "and none after the last try"


def test_a_silent_server_runs_into_the_timeout() -> None:
    with serve(lambda messages, body: Fault("hang")) as server:
        began = time.monotonic()
        with pytest.raises(ConnectionError, match="timed out"):
            remote(server.url, timeout=0.2, retries=1).sample([ask("a")])
    assert len(server.requests) == 2 + 1 and 0.6 <= time.monotonic() - began < 10, "and it does not say hello either"


def test_a_silence_is_tried_once_more_only() -> None:
    """At 600 s each, five more tries of thousands of answers would take days."""
    def reply(messages: list, body: dict) -> Reply:
        return Fault("hang") if messages[-1]["content"] == "hard" else echo(messages, body)

    with serve(reply) as server:
        [[hard], [easy]] = remote(server.url, timeout=0.2, retries=5).sample([ask("hard"), ask("easy")])
    assert "timed out" in hard.error and easy.text == "echo easy" and len(server.requests) == 2 + 1


def test_no_server_at_all() -> None:
    with serve(echo) as server:
        url = server.url
    with pytest.raises(ConnectionError, match="What to do: see that the server is up"):
        remote(url).sample([ask("a")])
    with pytest.raises(ConnectionError, match="/v1/models failed"):
        remote(url, model=None)


def test_a_wrong_key_ends_the_batch_early() -> None:
    def reply(messages: list, body: dict) -> Reply:
        time.sleep(0.05)
        return Fault(status=401, message="no")

    with serve(reply) as server, pytest.raises(ConnectionError, match="401"):
        remote(server.url, concurrency=4).sample([ask(str(i)) for i in range(60)])
    assert len(server.requests) == 4


def test_a_lost_batch_waits_for_nobody() -> None:
    """One request is told to wait for a minute; the key of another is refused."""
    def reply(messages: list, body: dict) -> Reply:
        if messages[-1]["content"] == "slow":
            return Fault(status=429, retry_after="60")
        time.sleep(0.1)
        return Fault(status=401, message="no")

    began = time.monotonic()
    with serve(reply) as server, pytest.raises(ConnectionError, match="401"):
        remote(server.url).sample([ask("slow"), ask("b")])
    assert time.monotonic() - began < 20


def test_retries_leave_the_global_random_state_alone() -> None:
    random.seed(1)
    before = random.getstate()
    with serve(first_fault(Fault())) as server:
        remote(server.url).sample([ask("a")])
    assert random.getstate() == before


# -- models that turn down a setting ----------------------------------------------------------------------------------


def picky(messages: list, body: dict) -> str | Fault:
    """OpenAI's reasoning models and Claude in one: what they refuse, in their own words."""
    if "max_tokens" in body:
        return Fault(status=400, message="'max_tokens' is not supported. Use 'max_completion_tokens' instead.")
    if body.get("temperature", 1) != 1:
        return Fault(status=400, message="Unsupported value: 'temperature' does not support 0.7 with this model.")
    return "fine words indeed"


def test_a_refused_setting_is_left_out_and_remembered() -> None:
    with serve(picky) as server:
        model = remote(server.url, retries=3, concurrency=1)
        with pytest.warns(UserWarning) as warned:
            answers = model.sample([ask("a"), ask("b")], n=2, temperature=0.7, max_new_tokens=2)
        assert [[(s.text, s.truncated) for s in row] for row in answers] == [[("fine words", True)] * 2] * 2
        # A socket of an earlier test that is collected now warns, too.
        said = [str(w.message) for w in warned if w.category is UserWarning]
        assert sorted(text.split(" turns down ")[1].split(",")[0] for text in said) == ["max_tokens", "temperature"]
    assert len(server.requests) == 2 + 4
    assert server.requests[-1]["body"] == {"model": "m", "messages": ask("b"), "stream": False, "top_p": 1.0,
                                           "max_completion_tokens": 2}


def test_what_was_dropped_is_kept_with_the_servers_words() -> None:
    with serve(picky) as server, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = remote(server.url)
        model.sample([ask("a")], n=20, temperature=0.7)
        assert model.dropped == {
            "max_tokens": "400: 'max_tokens' is not supported. Use 'max_completion_tokens' instead.",
            "temperature": "400: Unsupported value: 'temperature' does not support 0.7 with this model."}
        asked = len(server.requests)
        model.sample([ask("a")], n=20, temperature=0.7)
    assert len(server.requests) == asked + 20, "the second batch knows"


def test_it_is_warned_once_whatever_the_threads() -> None:
    with serve(picky) as server, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        remote(server.url, retries=0).sample([ask("a")], n=40, temperature=0.7)
    assert len([warning for warning in warned if warning.category is UserWarning]) == 2


@pytest.mark.parametrize("words, dropped", [
    ({"message": "Unsupported value", "param": "temperature"}, "temperature"),
    ({"message": "`temperature` and `top_p` cannot both be specified for this model. Please use only one."}, "top_p"),
    ({"message": "Unrecognized request argument supplied: top_k"}, "top_k"),
])
def test_the_setting_is_found_in_any_words(words: dict, dropped: str) -> None:
    def reply(messages: list, body: dict) -> Reply:
        return refusal(400, **words) if dropped in body else "fine"

    with serve(reply) as server, pytest.warns(UserWarning, match=f"m turns down {dropped}, so it is left out"):
        model = remote(server.url)
        [[sample]] = model.sample([ask("a")], top_k=7)
    assert sample.text == "fine" and [*model.dropped] == [dropped] and len(server.requests) == 2


@pytest.mark.parametrize("words", [VLLM, VLLM_NEW, "max_tokens: 9999 > 8192, which is the maximum allowed number"])
def test_a_prompt_too_long_costs_no_setting(words: str) -> None:
    """Without max_tokens vLLM would answer with what room is left, and every later answer would have no limit."""
    def reply(messages: list, body: dict) -> Reply:
        too_long = "long" in messages[-1]["content"] and ("max_tokens" in body or "max_completion_tokens" in body)
        return refusal(400, message=words, param="max_tokens") if too_long else echo(messages, body)

    with serve(reply) as server:
        model = remote(server.url)
        [[long], [short]] = model.sample([ask("long"), ask("b")])
    assert long.error and not long.text and short.text == "echo b"
    assert model.dropped == {} and all("max_tokens" in request["body"] for request in server.requests)


def test_a_400_about_a_setting_that_was_not_sent_is_no_reason_to_drop_one() -> None:
    final = pytest.raises(ConnectionError, match="400")
    with serve(lambda messages, body: Fault(status=400, message="top_k max_completion_tokens")) as server, final:
        remote(server.url).sample([ask("a")])
    assert [len(request["body"]["messages"]) for request in server.requests] == [2, 1], "the prompt, and a hello"


# -- prompts that the server cuts -------------------------------------------------------------------------------------


def reading(count: Callable[[list], object]):
    """A server that says that it has read so many tokens."""
    return lambda messages, body: raw(choices=[{"message": {"content": "fine"}, "finish_reason": "stop"}],
                                      usage={"prompt_tokens": count(messages), "completion_tokens": 1})


@pytest.mark.parametrize("text, least", [("word " * 9000, 9002), ("大" * 80000, 10001)])
def test_a_prompt_that_the_server_cuts_is_warned_of_once(text: str, least: int) -> None:
    """Ollama's 4,096."""
    with serve(reading(lambda messages: 4096)) as server, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        model = remote(server.url)
        samples = model.sample([ask(text)] * 30)
    assert all(row[0].text == "fine" for row in samples)
    [warning] = [warning for warning in warned if warning.category is UserWarning]
    assert f"cuts long prompts: it says that it read 4,096 tokens of at least {least:,}." in str(warning.message)
    assert model.usage.tokens_read == 30 * 4096


@pytest.mark.parametrize("text, count", [
    ("word " * 9000, 9500), ("word " * 9000, 0), ("word " * 9000, None), ("word " * 9000, "4096"),
    ("大" * 8000, 4500), ("=" * 3000 + " " * 90000, 600), ("short", 1), ("word " * 400, 7)])
def test_other_prompts_are_not_warned_of(text: str, count: object) -> None:
    """No count at all, a plausible one, long lines and white space, which cost few tokens, and short prompts."""
    with serve(reading(lambda messages: count)) as server, warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert remote(server.url).sample([ask(text)])[0][0].text == "fine"


# -- the way there ----------------------------------------------------------------------------------------------------


def test_offline_mode_of_the_hub_keeps_nobody_from_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with serve(echo) as server:
        assert remote(server.url, model=None).sample([ask("a")])[0][0].text == "echo a"


def test_proxies_are_for_other_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test's server plays the proxy for a host that there is not; port 9 would refuse everything."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with serve(echo) as server:
        assert remote(server.url).sample([ask("a")])[0][0].text == "echo a"
        monkeypatch.setenv("HTTP_PROXY", server.url.removesuffix("/v1"))
        assert remote("http://model.invalid/v1").sample([ask("b")])[0][0].text == "echo b"
    assert server.requests[-1]["path"] == "http://model.invalid/v1/chat/completions"


def test_a_proxy_that_cannot_be_used_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    with pytest.raises(ValueError, match="the proxy in HTTP_PROXY or ALL_PROXY cannot be used: Using SOCKS proxy"):
        remote("http://model.invalid/v1")


def test_connections_are_used_again() -> None:
    with serve(echo) as server:
        model = remote(server.url, concurrency=3)
        for _ in range(4):
            model.sample([ask("a")] * 6)
        pool = model._client._transport._pool
        assert 1 <= len(pool.connections) <= 3


# -- the key ----------------------------------------------------------------------------------------------------------


def test_where_the_key_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """argument > LSE_API_KEY > OPENAI_API_KEY > none; never the Hugging Face login of this machine."""
    monkeypatch.setenv("HF_TOKEN", "hf_not_for_you")
    with serve(echo) as server:
        remote(server.url).sample([ask("a")])
        monkeypatch.setenv("OPENAI_API_KEY", "openai")
        remote(server.url, model=None).sample([ask("a")])
        monkeypatch.setenv("LSE_API_KEY", "lse\n")  # as read from a file
        remote(server.url).sample([ask("a")])
        remote(server.url, api_key="given").sample([ask("a")])
    assert [request["key"] for request in server.requests] == ["no-key", "openai", "openai", "lse", "given"]


def test_solver_and_editor_may_have_keys_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LSE_API_KEY", "both")
    monkeypatch.setenv("LSE_EDITOR_API_KEY", "the-editors")
    with serve(echo) as server:
        settings = evolve.Config(solver=server.url, editor=f"{server.url}/")
        solver, editor = evolve.load_models(settings)
        for model in (solver, editor):
            model.sample([ask("a")])
    assert evolve.is_same_model(solver, editor)  # one name on one server
    editor.model = "another"
    assert not evolve.is_same_model(solver, editor)
    keys = [request["key"] for request in server.requests]
    assert keys == ["both", "the-editors", "both", "the-editors"]  # the models are listed, then asked


def test_a_wrong_key_is_found_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though a server that lists no models will do where the model is named."""
    settings = evolve.Config()
    with serve(echo, models=()) as server:
        assert evolve.open_model(server.url, "x", settings, "editor").model == "x"
    monkeypatch.setenv("LSE_EDITOR_API_KEY", "wrong")
    refused = pytest.raises(ConnectionError, match="no such key(?s:.*)the key in LSE_EDITOR_API_KEY")
    with serve(echo, nowhere=Fault(status=401, message="no such key")) as server, refused:
        evolve.open_model(f"{server.url}/deep", "x", settings, "editor")


@pytest.mark.parametrize("name", ["localhost:8000/v1", "localhost/v1", "host.lan:80", "10.0.0.1:8000/v1", "[::1]:80"])
def test_a_server_without_its_scheme_is_recognised(name: str) -> None:
    with pytest.raises(ValueError, match=f"--solver {re.escape(name)}: is it a server. Then write http:// or https://"):
        evolve.open_model(name, "", evolve.Config(), "solver")


def test_a_url_is_no_checkpoint() -> None:
    with pytest.raises(SystemExit, match="a URL is a server's: lse.RemoteModel"):
        evolve.load_model("http://localhost:8000/v1")


@pytest.mark.parametrize("fault", [
    Fault(status=401, message=f"Incorrect API key: {KEY}"), Fault(status=500, message=f"Bearer {KEY} broke me"),
    Fault("raw", message=f"who sent {KEY}?"), Fault("raw", message=f'{{"error": "{KEY}"}}'),
    Fault(status=400, message=f"{KEY} takes no temperature"), Fault(status=429, message="x" * 440 + KEY),
    Fault("raw", message='{"error": "' + KEY.replace("/", "\\/").replace("+", "\\u002b") + '"}'),
])
def test_the_key_never_shows(fault: Fault, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
                             capfd: pytest.CaptureFixture) -> None:
    """Not in the error, its traceback, repr, logs, warnings or output, though the server sends it back."""
    monkeypatch.setenv("LSE_API_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    with serve(lambda messages, body: fault) as server, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        model = remote(server.url)
        with pytest.raises(ConnectionError) as caught:
            model.sample([ask("a")])
    assert server.requests[0]["key"] == KEY, "it was sent, though"
    error = caught.value
    assert error.__context__ is None and error.__cause__ is None, "the original error knows the key"
    seen = [str(error), repr(error), repr(model), str(model), "".join(traceback.format_exception(error)),
            caplog.text, *capfd.readouterr(), *(str(w.message) for w in warned)]
    assert not [text for text in seen if KEY in text or KEY[:8] in text]


@pytest.mark.parametrize("key", ["sk-two words", "sk-new\nline", "sk-smart’quote", "sk-\x01"])
def test_a_key_that_cannot_be_sent_is_refused_without_showing_it(key: str) -> None:
    with pytest.raises(ValueError, match="one ASCII word in LSE_API_KEY") as caught:
        remote("http://127.0.0.1:9/v1", api_key=key)
    assert "sk-" not in str(caught.value)


@pytest.mark.parametrize("url", [
    "localhost:8000/v1", "ftp://host/v1", "", "http://", "http://:8000", "http://host:secret/v1", "http://host :80/v1",
    "https://me:secret@host/v1", "https://secret@host/v1", "https://host/v1?api_key=secret", "https://host/v1?key=secret",
    "https://host/v1?api-version=1&token=secret", "https://host/v1?code=secret", "https://host/v1?api%5Fkey=secret",
    "https://host/v1?sk-123", "https://host/v1?sk-123=", "https://host/v1?subscription-key=secret", "https://host/v1?sig=secret",
    "https://host/v1?Access_Token=secret", "https://host/v1#secret", "http://[secret/v1"])
def test_a_url_that_is_none_or_holds_a_key_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="http://host:8000/v1") as caught:
        remote(url)
    seen = "".join(traceback.format_exception(caught.value))
    assert "secret" not in str(caught.value) and "secret" not in seen


def test_both_headers_carry_the_key_and_nothing_else_does(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """Azure reads api-key. No Hugging Face login of this machine, no .netrc."""
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password netrc_secret")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HF_TOKEN", "hf_not_for_you")
    with serve(echo, base="/openai/deployments/gpt") as server:
        remote(server.url + "?api-version=2024-10-21", api_key=KEY).sample([ask("a")])
        remote(server.url).sample([ask("a")])
    first, second = ({k.lower(): v for k, v in request["headers"].items()} for request in server.requests)
    assert first["api-key"] == KEY and first["authorization"] == f"Bearer {KEY}"
    assert second["api-key"] == "no-key" and second["authorization"] == "Bearer no-key"
    assert "hf_not" not in str(server.requests) and "netrc_secret" not in str(server.requests)


def test_a_redirect_is_not_followed_with_the_key() -> None:
    with serve(echo) as other, serve(lambda *_: Fault(status=307, location=f"{other.url}/chat/completions")) as server:
        with pytest.raises(ConnectionError, match=f"moved to {other.url}"):
            remote(server.url, api_key=KEY).sample([ask("a")])
    assert not other.requests


def test_a_model_cannot_be_pickled_with_its_key() -> None:
    with pytest.raises(TypeError):
        pickle.dumps(remote("http://127.0.0.1:9/v1", api_key=KEY))


def test_words_that_are_kept_are_clean() -> None:
    """One line, no key, no half of a UTF-16 pair; they go to files."""
    words = f"bad \ud800 prompt\r\n\tfrom {KEY} " + "x" * 9999

    def reply(messages: list, body: dict) -> Reply:
        return refusal(400, message=words) if messages[-1]["content"] == "a" else "fine"

    with serve(reply) as server:
        [[sample], _] = remote(server.url, api_key=KEY).sample([ask("a"), ask("b")])
    assert sample.error.startswith("400: bad ? prompt from *** xxx") and len(sample.error) == 400


if __name__ == "__main__":
    print(as_markdown())
