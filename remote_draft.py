"""Draft of lse.py's "# Remote models" section: paste everything below the rule; the imports go to the top of lse.py."""

from __future__ import annotations

import os
import re
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from random import SystemRandom
from threading import Lock
from typing import Any

from huggingface_hub import InferenceClient, get_session
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import hf_raise_for_status


@dataclass(frozen=True)
class Sample:  # stand-in: lse.py has the real one
    text: str
    ids: Any = None
    prompt_ids: Any = None
    truncated: bool = False


# ---------------------------------------------------------------------------------------------------------------------
# Remote models
# ---------------------------------------------------------------------------------------------------------------------


class RemoteModel:
    """A model behind an OpenAI-compatible server (OpenAI, Anthropic, vLLM, `transformers serve`), used as a LocalModel.

    base_url: "http(s)://host/v1". model: its name there; None takes the first that GET /v1/models lists.
    api_key: default $LSE_API_KEY, else $OPENAI_API_KEY; never printed, and cut out of error messages.
    timeout: seconds without a byte. concurrency: requests in flight. extra: more fields for every request.
    retries, backoff: what may pass (429, 5xx, timeout, lost connection, unreadable or empty reply) is tried again up to
    `retries` times, after about backoff * 2^attempt seconds or what Retry-After asks for, never more than a minute.
    Counts `calls` (responses received) and, as the server reports them, `prompt_tokens` and `completion_tokens`.
    Raises ConnectionError with the server's own message when it gives up.
    """

    def __init__(self, base_url: str, model: str | None = None, api_key: str | None = None, *, timeout: float = 600.0,
                 concurrency: int = 16, retries: int = 5, backoff: float = 1.0, extra: dict | None = None) -> None:
        key = (api_key or os.environ.get("LSE_API_KEY") or os.environ.get("OPENAI_API_KEY") or "").strip()
        if not re.fullmatch("[!-~]*", key):  # the HTTP library would refuse it, and quote it
            raise ValueError("the API key holds a space, a line break or a non-ASCII character: set LSE_API_KEY again")
        if not re.fullmatch(r"https?://[^\s@]+", base_url):  # with an @ it would hold a password
            raise ValueError("a server's URL looks like http://host:8000/v1; a key goes into LSE_API_KEY, not in here")
        self.base_url = base_url.rstrip("/").removesuffix("/chat/completions").removesuffix("/v1") + "/v1"
        # Without a key, InferenceClient would send this machine's Hugging Face token to whatever server it talks to.
        self._key, self.timeout, self.concurrency = key or "no-key", timeout, concurrency
        self._client = InferenceClient(base_url=self.base_url, api_key=self._key, timeout=timeout)
        self.retries, self.backoff, self.extra = retries, backoff, extra or {}
        self.calls = self.prompt_tokens = self.completion_tokens = 0
        self._lock, self._refused = Lock(), set[str]()  # settings that this model has turned down
        self.model = model or ""
        self.model = model or self._ask(None, {})

    def __repr__(self) -> str:
        return f"{self.model or 'the first model'} at {self.base_url}"

    def sample(self, chats: list[list[dict[str, str]]], n: int = 1, max_new_tokens: int = 512, temperature: float = 1.0,
               top_p: float = 1.0, top_k: int = 0) -> list[list[Sample]]:
        """n samples for each chat, in order; temperature 0 is greedy. top_k = 0 is not sent: OpenAI has no top_k."""
        body = {"max_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k or None}

        def answers(chat: list[dict[str, str]]) -> list[Sample]:
            samples: list[Sample] = []
            while left := n - len(samples):  # a server that ignores n sends one choice at a time
                samples += self._ask(chat, {**body, "n": left if left > 1 else None, **self.extra})[:left]
            return samples

        with ThreadPoolExecutor(self.concurrency) as pool:
            return list(pool.map(answers, chats))  # an error cancels the chats that have not begun

    def _ask(self, chat: list[dict[str, str]] | None, body: dict) -> Any:
        """One request, retried: a list of Samples, at least one; for chat None the name of the server's first model."""
        for attempt in range(self.retries + 1):
            if "max_tokens" in self._refused:  # the name that OpenAI's reasoning models insist on
                body = {"max_completion_tokens": body.get("max_tokens"), **body}
            body = {name: value for name, value in body.items() if name not in self._refused and value is not None}
            try:
                return self._complete(chat, body) if chat is not None else self._first_model()
            except (HTTPError, ValueError, LookupError, TypeError, AttributeError) as error:  # the last three: odd JSON
                # huggingface_hub stumbles over an error body that is no JSON object: the response is one level down
                response = getattr(error, "response", None) or getattr(error.__context__, "response", None)
                said = getattr(error, "server_message", None) or (response.text if response else str(error))
                said = f"{said or type(error).__name__} {getattr(error, 'doc', '')}"  # doc: the JSON that is none
            status, after = (response.status_code, response.headers.get("retry-after", "")) if response else (0, "")
            message = f"{status or 'no usable answer'}: {said.replace(self._key, '***').strip()[:500]}"
            # GPT-5 turns down a temperature, Claude an n: leave out the setting that a 400 names, and say so.
            named = [name for name in ("top_k", "top_p", "n", "temperature", "max_tokens")
                     if status == 400 and name in body and re.search(rf"\b{name}\b", message)]
            if named:
                self._refused.add(named[0])
                warnings.warn(f"{self} turns down {named[0]}, so it is left out ({message})", stacklevel=2)
            elif 400 <= status < 500 and status not in (408, 409, 425, 429):
                break
            elif attempt < self.retries:  # jitter of its own making: retries must not move a seeded run
                wait = max(self.backoff * 2**attempt * (0.5 + SystemRandom().random()),
                           float(after) if re.fullmatch(r"\d+(\.\d+)?", after) else 0.0)
                time.sleep(min(wait, 60.0))
        hint = {401: "put a valid key into LSE_API_KEY", 403: "put a key that may use this model into LSE_API_KEY",
                404: "check the URL (it ends in /v1) and the model's name", 400: "change the request or the model"}
        do = hint.get(status, "see that the server is up and not overloaded, then run again")
        raise ConnectionError(f"{self} failed, try {attempt + 1} of {self.retries + 1}: {message}\nWhat to do: {do}")

    def _complete(self, chat: list[dict[str, str]], body: dict) -> list[Sample]:
        """The usable choices of one request, counted. ValueError, with the reply, if there are none."""
        reply = self._client.chat_completion(chat, model=self.model, extra_body=body)
        usage, choices = reply.get("usage") or {}, [(c["message"]["content"], c["finish_reason"] == "length")
                                                    for c in reply.get("choices") or []]
        # Cut off while still reasoning: no content, yet an answer. A lone surrogate could be neither saved nor sent on.
        samples = [Sample((text or "").encode("utf-8", "replace").decode(), truncated=cut)
                   for text, cut in choices if isinstance(text, str) or cut]
        with self._lock:
            self.calls += len(samples)
            self.prompt_tokens += usage.get("prompt_tokens") or 0
            self.completion_tokens += usage.get("completion_tokens") or 0
        if not samples:
            raise ValueError(f"a reply without text: {dict(reply)}")
        return samples

    def _first_model(self) -> str:
        reply = get_session().get(f"{self.base_url}/models", headers={"Authorization": f"Bearer {self._key}"},
                                  timeout=self.timeout)
        hf_raise_for_status(reply)
        return reply.json()["data"][0]["id"]
