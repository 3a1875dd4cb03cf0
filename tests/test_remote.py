"""RemoteModel against a local HTTP server that answers, stumbles, lies and falls silent."""

from __future__ import annotations

import logging
import pickle
import random
import threading
import time
import traceback
import warnings

import pytest
from server import Fault, serve

from lse import RemoteModel

KEY = "sk-a-secret/that+nobody=may-see"


@pytest.fixture(autouse=True)
def no_inherited_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """No key but the test's own, and no HF_HUB_OFFLINE, which would also forbid the loopback interface."""
    for name in ("LSE_API_KEY", "OPENAI_API_KEY", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}]


def remote(url: str, **options) -> RemoteModel:
    """A model whose pauses are too short to notice and whose patience ends after two more tries."""
    return RemoteModel(url, **{"model": "m", "timeout": 30.0, "retries": 2, "backoff": 0.001, **options})


def echo(messages: list, body: dict) -> str:
    return "echo " + messages[-1]["content"]


def first_fault(*faults: Fault):
    """A reply function that stumbles over `faults`, one per request, and then recovers."""
    left, lock = list(faults), threading.Lock()

    def reply(messages: list, body: dict) -> str | Fault:
        with lock:
            return left.pop(0) if left else echo(messages, body)

    return reply


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


@pytest.mark.parametrize("tail", ["", "/", "/v1", "/v1/", "/v1/chat/completions"])
def test_every_usual_spelling_of_the_url(tail: str) -> None:
    with serve(echo) as server:
        model = remote(server.url.removesuffix("/v1") + tail, model=None)
        assert model.model == "test-model"
        assert model.sample([ask("a")])[0][0].text == "echo a"
    assert [request["path"] for request in server.requests] == ["/v1/models", "/v1/chat/completions"]


def test_the_first_listed_model_is_the_default() -> None:
    with serve(echo, models=("first", "second")) as server:
        remote(server.url, model=None).sample([ask("a")])
    assert server.requests[-1]["body"]["model"] == "first"
    with serve(echo, models=()) as server, pytest.raises(ConnectionError, match="index out of range"):
        remote(server.url, model=None)


def test_finish_reason_length_is_truncated() -> None:
    with serve(lambda messages, body: messages[-1]["content"]) as server:
        [[long], [short]] = remote(server.url).sample([ask("one two three"), ask("four")], max_new_tokens=2)
    assert (long.text, long.truncated) == ("one two", True) and (short.text, short.truncated) == ("four", False)


def test_a_key_in_an_answer_is_not_kept_and_an_ordinary_word_is() -> None:
    with serve(lambda messages, body: f"Bearer {KEY} EMPTY") as server:
        assert remote(server.url, api_key=KEY).sample([ask("a")])[0][0].text == "Bearer *** EMPTY"
        assert "EMPTY" in remote(server.url, api_key="EMPTY").sample([ask("a")])[0][0].text


@pytest.mark.parametrize("finish", ["length", "content_filter"])
def test_no_content_is_an_empty_answer(finish: str) -> None:
    """Cut off while reasoning, or refused by a filter: it would happen again, and must not end a run of thousands."""
    with serve(lambda messages, body: Fault("null", finish=finish)) as server:
        [[sample]] = remote(server.url).sample([ask("a")])
    assert (sample.text, sample.truncated) == ("", finish == "length") and len(server.requests) == 1


def test_lone_surrogates_are_replaced() -> None:
    with serve(lambda messages, body: "bad \ud800 good") as server:
        [[sample]] = remote(server.url).sample([ask("a")])
    assert sample.text == "bad ? good"


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


def test_calls_and_tokens_are_counted() -> None:
    """`ask` has 2 + 1 words; "echo a" has 2."""
    with serve(first_fault(Fault())) as server:
        model = remote(server.url)
        model.sample([ask("a"), ask("b")], n=4)
    assert (model.calls, model.prompt_tokens, model.completion_tokens) == (8, 8 * 3, 8 * 2)


def test_counts_do_not_race() -> None:
    """Reading the counter is made slow, so that without the lock two threads add to the same old value."""
    class Slow(RemoteModel):
        @property
        def calls(self) -> int:
            count = self._calls
            time.sleep(0.002)
            return count

        @calls.setter
        def calls(self, count: int) -> None:
            self._calls = count

    with serve(echo) as server:
        model = Slow(server.url, "m", concurrency=8)
        model.sample([ask("a")] * 40)
    assert (model.calls, model.prompt_tokens, model.completion_tokens) == (40, 120, 80)


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
    assert len(server.requests) == 3, "retries are bounded: one try and two more"
    assert SAID.get(name, "") in str(caught.value) and server.url in str(caught.value)


def test_the_servers_message_is_kept_short() -> None:
    with serve(lambda messages, body: Fault(message="x" * 10**6)) as server, pytest.raises(ConnectionError) as caught:
        remote(server.url).sample([ask("a")])
    assert 400 < len(str(caught.value)) < 1000


@pytest.mark.parametrize("body", ["null", '"Unauthorized"', "[1]", '{"errors": 5}', "<p>Unauthorized</p>", ""])
def test_error_bodies_of_any_shape(body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub itself breaks on error bodies that are not a JSON object; the status must survive that."""
    monkeypatch.setattr("server.json.dumps", lambda content: body)
    refused = pytest.raises(ConnectionError, match="401.*(?s:.*)LSE_API_KEY")
    with serve(lambda messages, body: Fault(status=401)) as server, refused:
        remote(server.url).sample([ask("a")])
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_what_cannot_pass_is_not_tried_again(status: int) -> None:
    refused = pytest.raises(ConnectionError, match=f"{status}.*because of the moon(?s:.*)model name.*LSE_API_KEY")
    with serve(lambda messages, body: Fault(status=status, message="no, because of the moon")) as server, refused:
        remote(server.url).sample([ask("a")])
    assert len(server.requests) == 1


def test_retry_after_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("lse.time.sleep", pauses.append)
    with serve(first_fault(Fault(status=429, retry_after="7"))) as server:
        remote(server.url).sample([ask("a")])
        remote(server.url).sample([ask("a")])
    assert pauses == [7]


def test_pauses_double_and_jitter(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("lse.time.sleep", pauses.append)
    with serve(lambda messages, body: Fault()) as server, pytest.raises(ConnectionError):
        remote(server.url, backoff=1.0, retries=5).sample([ask("a")])
    assert len(pauses) == 5, "none after the last try"
    assert all(0.5 * 2**i <= pause <= 1.5 * 2**i for i, pause in enumerate(pauses))
    assert len({pause / 2**i for i, pause in enumerate(pauses)}) == 5


@pytest.mark.parametrize("after", ["soon", "Wed, 21 Oct 2015 07:28:00 GMT", "-5", "nan", "1e9"])
def test_an_odd_retry_after_is_ignored(after: str) -> None:
    with serve(first_fault(Fault(status=429, retry_after=after))) as server:
        assert remote(server.url).sample([ask("a")])[0][0].text == "echo a"


def test_nobody_waits_longer_than_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("lse.time.sleep", pauses.append)
    slow = Fault(status=429, retry_after="86400")
    with serve(lambda messages, body: slow) as server, pytest.raises(ConnectionError):
        remote(server.url).sample([ask("a")])
    assert pauses == [60.0, 60.0], "and none after the last try"


def test_a_silent_server_runs_into_the_timeout() -> None:
    with serve(lambda messages, body: Fault("hang")) as server:
        began = time.monotonic()
        with pytest.raises(ConnectionError, match="timed out"):
            remote(server.url, timeout=0.2, retries=1).sample([ask("a")])
    assert len(server.requests) == 2 and 0.4 <= time.monotonic() - began < 10


def test_no_server_at_all() -> None:
    with serve(echo) as server:
        url = server.url
    with pytest.raises(ConnectionError, match="What to do: see that the server is up"):
        remote(url).sample([ask("a")])
    with pytest.raises(ConnectionError, match="/v1/models failed"):
        remote(url, model=None)


def test_one_bad_chat_ends_the_batch_early() -> None:
    def reply(messages: list, body: dict) -> str | Fault:
        if messages[-1]["content"] == "0":
            return Fault(status=400, message="no")
        time.sleep(0.05)
        return "fine"

    with serve(reply) as server, pytest.raises(ConnectionError, match="400"):
        remote(server.url, concurrency=2).sample([ask(str(i)) for i in range(60)])
    assert len(server.requests) < 30


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
        assert sorted(str(w.message).split(" turns down ")[1].split(",")[0] for w in warned) == [
            "max_tokens", "temperature"]
    assert len(server.requests) == 2 + 4
    assert server.requests[-1]["body"] == {"model": "m", "messages": ask("b"), "stream": False, "top_p": 1.0,
                                           "max_completion_tokens": 2}


def test_a_400_about_a_setting_that_was_not_sent_is_final() -> None:
    final = pytest.raises(ConnectionError, match="400")
    with serve(lambda messages, body: Fault(status=400, message="top_k max_completion_tokens")) as server, final:
        remote(server.url).sample([ask("a")])
    assert len(server.requests) == 1


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


@pytest.mark.parametrize("url", ["localhost:8000/v1", "ftp://host/v1", "", "http://", "https://me:secret@host/v1",
                                 "https://host/v1?api_key=secret"])
def test_a_url_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="http://host:8000/v1") as caught:
        remote(url)
    assert "secret" not in str(caught.value)


def test_a_model_cannot_be_pickled_with_its_key() -> None:
    with pytest.raises(TypeError):
        pickle.dumps(remote("http://127.0.0.1:9/v1", api_key=KEY))
