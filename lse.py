"""Learning to Self-Evolve, the method: sampling, log-probs, delta reward, advantages, loss, tree.

An *editor* rewrites the instructions that a frozen *solver* works under, and is trained on how much each single edit
helps (Chen et al., arXiv 2603.18620). This file holds everything that needs a model or an equation. It knows nothing of
tasks, files or command lines: problems come in as chats, scores as numbers, and it can be copied away alone.

Symbols of the paper, and the words used here
    π_θ   solver: the frozen model that answers problems         c     instructions (the editable field of the context)
    f_ψ   editor: the policy that writes new instructions        c_0   instructions before an edit;  c_1: after it
    S     summary: k graded problems shown to the editor         R̄(c)  score: mean reward of the solver over a holdout
    G     edits sampled for one start state (a "group")          r     reward of an edit, R̄(c_1) − R̄(c_0)   (eq. 7)
    T     rounds of evolution; in shapes: tokens of a response   C     weight of exploration in the tree's UCB rule
    N     start states in a batch; in UCB: selections so far     v     how often a node was selected

Left out on purpose: a critic, a reference model and its KL, an entropy bonus, reward shaping. The reward already has
its baseline (the score before the edit), and one update per batch keeps the editor near the policy that sampled.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import InferenceClient, get_session
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import hf_raise_for_status
from jinja2 import TemplateError
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, DynamicLayer, GenerationConfig

Chat = list[dict[str, str]]  # [{"role": "system" | "user" | "assistant", "content": text}, ...]
Group = tuple[Tensor, Sequence[Tensor]]  # a prompt's ids (P,) and its G responses' ids, each (T,)

# ---------------------------------------------------------------------------------------------------------------------
# Sampling
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Sample:
    """One sampled response. `ids` are the very ids that were sampled, first EOS included, without padding."""

    text: str
    ids: Tensor | None  # (T,) on the CPU; None for a remote model
    prompt_ids: Tensor | None  # (P,)
    truncated: bool  # no EOS within max_new_tokens


class RoomyLayer(DynamicLayer):
    """Keys and values of one layer, with room for what will be sampled.

    A DynamicLayer copies all it holds at every new token: behind a long prompt, half of the time to sample. This one
    is copied once, from `layer`, whose row `owner[i]` becomes row i.
    """

    def __init__(self, layer: DynamicLayer, owner: Tensor, room: int) -> None:
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self.stores = [F.pad(old[owner], (0, 0, 0, room)) for old in (layer.keys, layer.values)]  # (rows, heads, L, d)
        self.keys, self.values = (store[:, :, : layer.keys.shape[2]] for store in self.stores)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        start, end = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        for store, new in zip(self.stores, (key_states, value_states)):
            store[:, :, start:end] = new
        self.keys, self.values = (store[:, :, :end] for store in self.stores)
        return self.keys, self.values


class LocalModel:
    """A causal language model and its tokenizer. `sample` never changes the weights or the train/eval mode."""

    def __init__(self, model, tokenizer, max_batch_tokens: int = 65536) -> None:
        """`max_batch_tokens` bounds rows x (longest prompt + max_new_tokens), which is what fills the memory."""
        if getattr(tokenizer, "chat_template", None) is None:
            raise ValueError("The tokenizer has no chat template: set its chat_template or use an instruct model.")
        self.model, self.tokenizer, self.max_batch_tokens = model, tokenizer, max_batch_tokens
        self.calls = self.prompt_tokens = self.completion_tokens = 0  # what a run has cost, as RemoteModel counts it
        ends = model.generation_config.eos_token_id  # an int, a list or None; base models often lack the chat's own end
        self.eos = sorted({*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None})
        controls = sorted((t.content for t in tokenizer.added_tokens_decoder.values() if t.special), key=len)
        self.controls = re.compile(f"({'|'.join(map(re.escape, controls[::-1])) or '(?!)'})")  # longest first

    def render(self, chat: Chat) -> str:
        """The chat as text, template applied once; a system message joins the first user's where none is allowed."""
        template = self.tokenizer.apply_chat_template
        try:
            return template(chat, tokenize=False, add_generation_prompt=True, enable_thinking=False)
        except TemplateError:
            if len(chat) < 2 or chat[0]["role"] != "system":
                raise
            merged = {"role": "user", "content": chat[0]["content"] + "\n\n" + chat[1]["content"]}
            return self.render([merged, *chat[2:]])

    def encode(self, chat: Chat) -> list[int]:
        """Token ids of a chat up to where the answer begins.

        Contents come from models and data: a `<|im_start|>` in there must stay text, else instructions could forge a
        role. So control strings in contents are swapped for stand-ins before the template runs, and swapped back once
        the template's own control strings are cut out.
        """
        # Half a surrogate pair, which a server's JSON may carry, has no UTF-8: it becomes a question mark.
        chat = [message | {"content": message["content"].encode(errors="replace").decode()} for message in chat]
        contents = "".join(message["content"] for message in chat)
        found = sorted(set(self.controls.findall(contents)))
        if not found:
            return self.tokenizer(self.render(chat), add_special_tokens=False)["input_ids"]
        # One private-use character that the contents lack stands in for each.
        marks = dict(zip(found, (c for c in map(chr, range(0xE000, 0xF900)) if c not in contents)))
        back = str.maketrans({mark: control for control, mark in marks.items()})
        for message in chat:
            message["content"] = self.controls.sub(lambda hit: marks[hit[0]], message["content"])
        forged = self.tokenizer.convert_tokens_to_ids(found)  # a vocabulary of whole words cannot spell them: dropped
        ids = []
        for i, piece in enumerate(self.controls.split(self.render(chat))):  # text, control, text, ..., text
            if i % 2:
                ids.append(self.tokenizer.convert_tokens_to_ids(piece))
            else:
                plain = self.tokenizer(piece.translate(back), add_special_tokens=False, split_special_tokens=True)
                ids += [token for token in plain["input_ids"] if token not in forged]
        return ids

    def sample(self, chats: Sequence[Chat], n: int = 1, max_new_tokens: int = 512, temperature: float = 1.0,
               top_p: float = 1.0, top_k: int = 0) -> list[list[Sample]]:
        """n samples for each chat, in the order of the chats. `temperature=0` is greedy: then equal chats run once.

        `top_k=0` and `top_p=1` cut nothing off; leave them so when the samples are to be learned from, since
        `logprobs` scores the uncut distribution. Draws come from torch's global generator.
        """
        prompts, greedy = [tuple(self.encode(chat)) for chat in chats], temperature == 0
        # Sorted, so that rows which begin alike are neighbours: they share their prefill, and differ little in length.
        rows = sorted(set(prompts)) if greedy else sorted(prompts * n)
        drawn: dict[tuple[int, ...], list[Sample]] = {prompt: [] for prompt in prompts}
        cuts = {} if greedy else {"temperature": temperature, "top_p": top_p, "top_k": top_k}
        options = {"max_new_tokens": max_new_tokens, "do_sample": not greedy, "repetition_penalty": 1.0, **cuts}
        # Batches of at most `max_batch_tokens` tokens, padding and new tokens included.
        pending, longest = list[list[tuple[int, ...]]](), 0
        for row in rows:
            longest = max(longest, len(row))
            if not pending or (len(pending[-1]) + 1) * (longest + max_new_tokens) > self.max_batch_tokens:
                pending, longest = [*pending, []], len(row)
            pending[-1].append(row)
        while pending:
            batch, samples = pending.pop(0), []
            try:
                samples = self._generate(batch, options)
            except torch.OutOfMemoryError:
                if len(batch) == 1:  # cannot be halved
                    raise
            if not samples:  # not within `except`, whose traceback still holds the batch's tensors
                torch.cuda.empty_cache()
                pending[:0] = [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
            for row, sample in zip(batch, samples):
                drawn[row].append(sample)
        out = [[drawn[prompt][0]] * n if greedy else [drawn[prompt].pop() for _ in range(n)] for prompt in prompts]
        self.calls += n * len(out)
        self.prompt_tokens += n * sum(map(len, prompts))
        self.completion_tokens += sum(len(sample.ids) for row in out for sample in row)
        return out

    @torch.no_grad()
    def _generate(self, rows: list[tuple[int, ...]], options: dict) -> list[Sample]:
        """One batch. What is common is prefilled once: the prefix of all rows, then the rest of every distinct prompt.

        Layout of a row: prefix, rest, padding, last prompt token. Padding that follows needs no mask while prefilling;
        later the mask hides it, and positions count real tokens only (behind a sliding window, padding counts as well).
        The last token is left to `generate`, which must start from one.
        """
        model, distinct = self.model, {prompt: i for i, prompt in enumerate(sorted(set(rows)))}
        owner = torch.tensor([distinct[row] for row in rows], device=model.device)  # (rows,) -> distinct prompt
        prefix = len(os.path.commonprefix([min(rows)[:-1], max(rows)[:-1]]))  # in sorted rows, first and last decide
        gaps = [max(map(len, distinct)) - len(prompt) for prompt in distinct]
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else (self.eos + [0])[0]
        ids = [[*prompt[:-1], *[pad] * gap, prompt[-1]] for prompt, gap in zip(distinct, gaps)]
        mask = [[1] * (len(prompt) - 1) + [0] * gap + [1] for prompt, gap in zip(distinct, gaps)]
        ids, mask = torch.tensor([ids, mask], device=model.device)  # (distinct, L) each
        mode, config = model.training, model.generation_config
        model.eval()  # no dropout, and no gradient checkpointing: that would silently drop the cache
        # A checkpoint's own top_k, penalties or length limits must not leak into the sampling: start from a blank one.
        # A NaN among the logits must not end the process (on a GPU it would).
        blank = GenerationConfig(eos_token_id=self.eos or None, pad_token_id=pad, remove_invalid_values=True)
        try:
            model.generation_config, cache = blank, DynamicCache(config=model.config)
            if prefix:
                model(ids[:1, :prefix], past_key_values=cache, logits_to_keep=1)
                cache.batch_repeat_interleave(len(distinct))
            if prefix < ids.shape[1] - 1:
                model(ids[:, prefix:-1], past_key_values=cache, logits_to_keep=1)
            for i, layer in enumerate(cache.layers):
                if type(layer) is DynamicLayer and layer.is_initialized:
                    cache.layers[i] = RoomyLayer(layer, owner, options["max_new_tokens"])
                else:  # a sliding window, say: it stays small by itself
                    layer.batch_select_indices(owner)  # type: ignore[union-attr]
            out = model.generate(ids[owner], attention_mask=mask[owner], past_key_values=cache, **options)
        finally:
            model.generation_config = config
            model.train(mode)
        out = out[:, ids.shape[1] :].cpu()
        stop = torch.isin(out, torch.tensor(self.eos))  # (rows, T)
        responses = [row[ended == 0] for row, ended in zip(out, stop.cumsum(1) - stop.long())]  # first EOS included
        texts = self.tokenizer.batch_decode(responses, skip_special_tokens=True)
        return list(map(Sample, texts, responses, map(torch.tensor, rows), (~stop.any(1)).tolist()))


# ---------------------------------------------------------------------------------------------------------------------
# Remote models
# ---------------------------------------------------------------------------------------------------------------------


class RemoteModel:
    """A model behind an OpenAI-compatible server (OpenAI, Anthropic, vLLM, `transformers serve`), used as a LocalModel.

    base_url: "http(s)://host/v1". model: its name there; None takes the first that GET /v1/models lists.
    api_key: default $LSE_API_KEY, else $OPENAI_API_KEY; never printed, and cut out of error messages.
    timeout: seconds without a byte. concurrency: requests in flight.
    extra: more fields for every request; one that is None is not sent.
    retries, backoff: what may pass (429, 5xx, timeout, lost connection, unreadable reply) is tried again up to
    `retries` times, after about backoff * 2^attempt seconds or what Retry-After asks for, never more than a minute.
    Counts `calls` (responses received) and, as the server reports them, `prompt_tokens` and `completion_tokens`.
    Raises ConnectionError with the server's own message when it gives up.
    """

    def __init__(self, base_url: str, model: str | None = None, api_key: str | None = None, *, timeout: float = 600.0,
                 concurrency: int = 16, retries: int = 5, backoff: float = 1.0, extra: dict | None = None) -> None:
        # "no-key", because without any key InferenceClient would send this machine's Hugging Face token to the server.
        key = (api_key or os.environ.get("LSE_API_KEY") or os.environ.get("OPENAI_API_KEY") or "no-key").strip()
        # The HTTP library would refuse such a key, and quote it; a URL with an @ or ? may hold a password or a key.
        if not re.fullmatch("[!-~]+", key) or not re.fullmatch(r"https?://[^\s@?]+", base_url):
            raise ValueError("the URL looks like http://host:8000/v1, and the key is one ASCII word in LSE_API_KEY")
        self.base_url = base_url.rstrip("/").removesuffix("/chat/completions").removesuffix("/v1") + "/v1"
        self._client = InferenceClient(base_url=self.base_url, api_key=key, timeout=timeout)
        self._key, self.timeout, self.concurrency = key, timeout, concurrency
        self.retries, self.backoff, self.extra = retries, backoff, extra or {}
        self.calls = self.prompt_tokens = self.completion_tokens = 0
        self._lock, self._refused = Lock(), set[str]()  # refused: settings that the model has turned down
        self.model = model or self._ask({})

    def sample(self, chats: Sequence[Chat], n: int = 1, max_new_tokens: int = 512, temperature: float = 1.0,
               top_p: float = 1.0, top_k: int = 0) -> list[list[Sample]]:
        """n samples for each chat, in order; temperature 0 is greedy. top_k = 0 is not sent: OpenAI has no top_k.

        Each sample is a request of its own, since not every server knows OpenAI's n.
        """
        body = {"model": self.model, "max_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p,
                "top_k": top_k or None, "stream": False, **self.extra}
        with ThreadPoolExecutor(self.concurrency) as pool:  # an error cancels the requests that have not begun
            found = list(pool.map(self._ask, [{**body, "messages": chat} for chat in chats for _ in range(n)]))
        return [found[i * n : (i + 1) * n] for i in range(len(chats))]

    def _ask(self, body: dict) -> Any:
        """One chat completion, retried: a Sample. For an empty body the name of the first model that the server lists.

        GPT-5 turns down a temperature: a setting that a 400 names is left out from then on, with a warning.
        """
        url = f"{self.base_url}/{'chat/completions' if body else 'models'}"
        for attempt in range(self.retries + 1):
            sent = {name: value for name, value in body.items() if name not in self._refused and value is not None}
            if "max_tokens" in self._refused:  # the name that OpenAI's reasoning models insist on
                sent["max_completion_tokens"] = body["max_tokens"]
            try:
                return self._complete(sent) if body else self._first_model()
            except (HTTPError, ValueError, LookupError, TypeError, AttributeError) as error:  # the last four: odd JSON
                # huggingface_hub stumbles over an error body that is no JSON object: the response is one level down
                response = getattr(error, "response", None) or getattr(error.__context__, "response", None)
                status, after, said = 0, "", f"{error or type(error).__name__} {getattr(error, 'doc', '')}"
                if response is not None:
                    status, after = response.status_code, response.headers.get("retry-after", "")
                    with suppress(ValueError):  # str(json): without JSON's escapes, in which the key might hide
                        said = str(response.json())
            message = f"{status or 'no answer'}: {said.replace(self._key, '***').strip()[:500]}"
            named = [name for name in ("max_tokens", "temperature", "top_p", "top_k") if name in sent and name in said]
            if named and status in (400, 422):
                self._refused.add(named[0])
                warnings.warn(f"{self.model} turns down {named[0]}, so it is left out ({message})", stacklevel=2)
            elif 400 <= status < 500 and status not in (408, 409, 425, 429):
                break  # it cannot pass
            elif attempt < self.retries:  # jitter of its own making: retries must not move a seeded run
                wait = self.backoff * 2**attempt * random.SystemRandom().uniform(0.5, 1.5)
                time.sleep(min(max(wait, int(after) if after.isdecimal() else 0), 60.0))
        raise ConnectionError(f"{url} failed, try {attempt + 1} of {self.retries + 1}: {message}\nWhat to do: see that "
                              "the server is up, check URL, model name, settings, and the key in LSE_API_KEY")

    def _complete(self, body: dict) -> Sample:
        """One request, counted. Without content (still reasoning at the limit, or filtered) the answer is empty."""
        rest = {name: value for name, value in body.items() if name not in ("messages", "model")}
        reply = self._client.chat_completion(body["messages"], model=body["model"], extra_body=rest)
        if not reply.get("choices"):
            raise ValueError(f"a reply without choices: {dict(reply)}")
        choice, usage = reply["choices"][0], reply.get("usage") or {}
        text, cut = choice["message"]["content"] or "", choice["finish_reason"] == "length"
        with self._lock:
            self.calls += 1
            self.prompt_tokens += usage.get("prompt_tokens") or 0
            self.completion_tokens += usage.get("completion_tokens") or 0
        text = text.encode("utf-8", "replace").decode()  # lone surrogates cannot be saved
        if len(self._key) > 15:  # a server may echo the key, and answers are saved; "EMPTY" and the like are no secrets
            text = text.replace(self._key, "***")
        return Sample(text, None, None, cut)

    def _first_model(self) -> str:
        headers = {"Authorization": f"Bearer {self._key}"}
        reply = get_session().get(f"{self.base_url}/models", headers=headers, timeout=self.timeout)
        hf_raise_for_status(reply)
        return reply.json()["data"][0]["id"]


# ---------------------------------------------------------------------------------------------------------------------
# Log-probs: a prompt shared by G responses is computed once
# ---------------------------------------------------------------------------------------------------------------------


def shared_prompt_attention(module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs):
    """Attention over a row [prompt, all its responses]: a response sees the prompt and itself, not the others.

    Such rows are recognised by a mask with fewer queries than the row, (B, 1, R, P + R): the prompt's P queries need
    none, they are plain causal attention. That saves the (P + R)² mask and most of the work, and there is no cache,
    which gradient checkpointing would silently drop. All other calls are plain sdpa.
    """
    sdpa, p = AttentionInterface()["sdpa"], 0 if attention_mask is None else query.shape[2] - attention_mask.shape[2]
    if p == 0:
        return sdpa(module, query, key, value, attention_mask, **kwargs)
    prompt, _ = sdpa(module, query[:, :, :p], key[:, :, :p], value[:, :, :p], None, **kwargs)
    responses, _ = sdpa(module, query[:, :, p:], key, value, attention_mask, **kwargs)
    return torch.cat([prompt, responses], 1), None  # (B, P + R, heads, d)


AttentionInterface.register("shared_prompt", shared_prompt_attention)
AttentionMaskInterface.register("shared_prompt", AttentionMaskInterface()["sdpa"])


def pack(groups: Sequence[Group]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One row per group: the prompt without its last token; then, per response, that token and all response tokens but
    the last. So the second part holds exactly the tokens whose successors are scored: no prompt logits are computed.

    Returns ids (B, P + R), positions (B, P + R), mask (B, 1, R, P + R) and targets (B, R). Both parts are padded on the
    right, to the longest prompt and to the most response tokens.

    >>> ids, positions, mask, targets = pack([(torch.tensor([5, 6, 7]), [torch.tensor([1, 2]), torch.tensor([3])])])
    >>> ids.tolist(), positions.tolist(), targets.tolist()
    ([[5, 6, 7, 1, 7]], [[0, 1, 2, 3, 2]], [[1, 2, 3]])
    >>> mask[0, 0].int().tolist()
    [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 0, 0, 1]]
    """

    def pad(rows: list[Tensor], value: int = 0) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence([row.cpu() for row in rows], batch_first=True, padding_value=value)

    prompts = pad([prompt[:-1] for prompt, _ in groups])  # (B, P)
    inputs = pad([torch.cat([t for r in responses for t in (prompt[-1:], r[:-1])]) for prompt, responses in groups])
    targets = pad([torch.cat(list(responses)) for _, responses in groups])  # (B, R)
    lengths = torch.tensor([len(prompt) - 1 for prompt, _ in groups])[:, None]  # (B, 1)
    offsets = pad([torch.cat([torch.arange(len(r)) for r in responses]) for _, responses in groups])  # (B, R)
    owner = pad([torch.cat([torch.full((len(r),), i) for i, r in enumerate(rs)]) for _, rs in groups], -1)  # (B, R)
    places = torch.arange(prompts.shape[1])
    positions = torch.cat([places.expand_as(prompts), lengths + offsets], 1)
    own = (owner[:, :, None] == owner[:, None]).tril()  # (B, R, R): the same response, and not later
    sees = (places < lengths)[:, None].expand(-1, own.shape[1], -1)  # (B, R, P): the prompt without its padding
    return torch.cat([prompts, inputs], 1), positions, torch.cat([sees, own], 2)[:, None], targets


def group_logprobs(model, groups: Sequence[Group], temperature: float = 1.0) -> list[list[Tensor]]:
    """log p of every response token, differentiable: `logprobs` for several (prompt_ids, responses) in one forward.

    Returns one list per group with one (T,) tensor per response, float32 also for a bf16 model. The caller chooses how
    many groups fit in memory. The mean of −log p over tokens sampled at this temperature (top_p 1, top_k 0) is an
    unbiased estimate of the policy's entropy.
    """
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}; greedy sampling has no log-probs: use one above 0.")
    if any(min(map(len, (prompt, responses, *responses))) == 0 for prompt, responses in groups):
        raise ValueError("Every group needs a prompt and responses of at least one token each.")
    core = getattr(model, "module", model)  # under DistributedDataParallel
    ids, positions, mask, targets = (x.to(core.device) for x in pack(groups))
    window = getattr(core.config.get_text_config(), "sliding_window", None)
    if window is not None and positions.max() >= window:
        raise ValueError(f"The model attends to {window} tokens at a time; prompt and response must fit in there.")
    core.set_attn_implementation("shared_prompt")  # stays on: a checkpointed layer runs again in backward
    out = model(ids, position_ids=positions, attention_mask=mask, use_cache=False, logits_to_keep=targets.shape[1])
    logits = out.logits.to(torch.promote_types(out.logits.dtype, torch.float32)) / temperature  # (B, R, V)
    logp = -F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    lengths = [list(map(len, responses)) for _, responses in groups]
    return [list(row[: sum(ls)].split(ls)) for row, ls in zip(logp, lengths)]


def logprobs(model, prompt_ids: Tensor, responses: Sequence[Tensor], temperature: float = 1.0) -> list[Tensor]:
    """log p of every response token under the prompt: one (T,) float32 tensor per response, differentiable.

    `temperature` must be the one the responses were sampled with: the policy gradient is that of the sampling policy.
    """
    return group_logprobs(model, [(prompt_ids, responses)], temperature)[0]


# ---------------------------------------------------------------------------------------------------------------------
# Reward, advantages, loss
# ---------------------------------------------------------------------------------------------------------------------

INVALID_REWARD = -1.0  # flat, as in the official code: an edit that cannot be used, not −1 − R̄(c_0)


def delta_reward(after: Tensor, before: Tensor, valid: Tensor) -> Tensor:
    """eq. 7: R̄(c_1) − R̄(c_0); INVALID_REWARD where the edit is not valid. Broadcasts; `after` may be NaN there.

    >>> delta_reward(torch.tensor([0.75, 0.0]), torch.tensor(0.5), torch.tensor([True, False])).tolist()
    [0.25, -1.0]
    """
    return torch.where(valid, after - before, INVALID_REWARD)


def advantages(kind: str, after: Tensor, before: Tensor, valid: Tensor) -> Tensor:
    """Advantage of each edit, (N, G), from scores after (N, G) and before (N,) it.

    >>> after, before = torch.tensor([[1.0, 0.5], [0.5, 0.5]]), torch.tensor([0.5, 0.25])
    >>> valid = torch.ones(2, 2, dtype=torch.bool)
    >>> advantages("delta", after, before, valid).tolist()
    [[0.5, 0.0], [0.25, 0.25]]
    >>> advantages("grpo", after, before, valid).tolist()  # the second group says nothing
    [[0.7071067690849304, -0.7071067690849304], [0.0, 0.0]]
    """
    before = before[:, None].expand_as(after)
    delta, score = delta_reward(after, before, valid), torch.where(valid, after, INVALID_REWARD)
    centred = score - score.mean(1, keepdim=True)
    std = (centred.square().sum(1, keepdim=True) / max(1, score.shape[1] - 1)).sqrt()  # (N, 1), unbiased
    x, y = before - before.mean(), delta - delta.mean()
    kinds = {"delta": delta,  # the paper: the score before the edit is the baseline (eq. 8-10), nothing is scaled
             "score": score,  # the paper's counter-example: favours start states that were good already
             "grpo": torch.where(std > 1e-6, centred / std, 0.0),  # equal scores (up to rounding) say nothing: zero
             "batch": y, "node": delta - delta.mean(1, keepdim=True),
             # Ours. The null edit is a biased guess of the mean edit: a bad start has much to gain, a good one nothing.
             # The least-squares line of the reward in R̄(c_0) over the batch removes that, without a group: G may be 1.
             "line": y - x * (x * y).sum() / (x * x).sum().clamp(min=1e-12)}
    if kind not in kinds:
        raise ValueError(f"Unknown advantage {kind!r}; choose delta, grpo, score, line, node or batch.")
    return kinds[kind]


def policy_loss(logprobs: Sequence[Tensor], advantages: Sequence[float] | Tensor, n_tokens: int,
                old_logprobs: Sequence[Tensor] | None = None, clip: float = 0.2) -> Tensor:
    """Clipped policy-gradient loss of some responses, one advantage each: sum over tokens / `n_tokens`.

    `n_tokens` counts the response tokens of the WHOLE batch, so the losses of its micro-batches add up. Every token
    weighs the same: no 1/|o| per response, which would favour long failures. Without `old_logprobs` the batch is
    on-policy: the ratio is 1, the clip never acts, and the gradient is −A ∇log p.

    >>> two, one = torch.tensor([-1.0, -2.0]), torch.tensor([-0.5])  # the fourth token is in another micro-batch
    >>> policy_loss([two, one], [1.0, -1.0], n_tokens=4).item()
    -0.25
    """
    new = torch.cat(list(logprobs))  # (tokens,)
    old = new.detach() if old_logprobs is None else torch.cat(list(old_logprobs)).detach()
    weight = torch.cat([torch.full_like(row.detach(), float(a)) for row, a in zip(logprobs, advantages, strict=True)])
    ratio = torch.exp(new - old)
    return -torch.minimum(ratio * weight, ratio.clamp(1 - clip, 1 + clip) * weight).sum() / n_tokens


class MasterAdamW:
    """AdamW whose steps are not lost in bf16.

    At lr 1e-6 a step is smaller than half the gap between neighbouring bf16 numbers, and 98% of the weights would never
    move. So parameters in 16 bits get float32 masters, and the moments, on the CPU: the GPU holds 2 + 2 bytes per
    parameter, weight and gradient. Parameters in float32 are their own masters, and this is plain AdamW.
    """

    def __init__(self, model, lr: float, max_norm: float = 1.0, weight_decay: float = 0.0, betas=(0.9, 0.999)) -> None:
        """`max_norm` clips the norm of the whole gradient. The learning rate may be changed in `adamw.param_groups`."""
        self.params, self.max_norm = [p for p in model.parameters() if p.requires_grad], max_norm
        self.masters = [p.detach().cpu().float() if p.dtype.itemsize < 4 else p for p in self.params]
        self.copies = [(p, m) for p, m in zip(self.params, self.masters) if p is not m]
        self.adamw = torch.optim.AdamW(self.masters, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)

    @torch.no_grad()
    def step(self) -> float:
        """Clip, step, clear the gradients; returns their norm before clipping. Not finite: the step was skipped."""
        norm = float(torch.nn.utils.clip_grad_norm_(self.params, self.max_norm))
        if math.isfinite(norm):
            for param, master in self.copies:
                master.grad = None if param.grad is None else param.grad.cpu().float()
            self.adamw.step()
            for param, master in self.copies:
                param.copy_(master)
        for tensor in [*self.params, *self.masters]:
            tensor.grad = None
        return norm

    def state_dict(self) -> dict:
        """The moments and the masters, from which the model's own weights follow."""
        return {"adamw": self.adamw.state_dict(), "masters": [master.detach() for master in self.masters]}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        self.adamw.load_state_dict(state["adamw"])
        for param, master, saved in zip(self.params, self.masters, state["masters"], strict=True):
            param.copy_(master.copy_(saved))


# ---------------------------------------------------------------------------------------------------------------------
# The tree of instructions (Algorithm 1)
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Node:
    """One version of the instructions. `score` None: a rejected edit, kept for the record and never selected."""

    id: int
    parent: int | None  # id of the node it was edited from; None for the root
    instructions: str
    score: float | None  # R̄, mean over the holdout
    scores: list[float] | None = None  # the score of each holdout problem, for "pareto"
    visits: int = 0  # v: how often it was selected
    summary: list[dict] = field(default_factory=list)  # S: the graded problems seen when it was made
    note: str = ""  # why an edit was rejected


class EvolutionTree:
    """All versions of the instructions, and which one to edit next. Ties go to the newest node, in every rule."""

    def __init__(self, instructions: str, score: float | None, scores=None, c: float = 2.0, summary=None) -> None:
        """`c` is C of the UCB rule, 2 in the paper; 0 is best-first."""
        self.c, self.rounds, self.nodes = c, 0, list[Node]()  # rounds: N, the selections so far
        self.add(None, instructions, score, scores, summary)

    def add(self, parent: Node | int | None, instructions: str, score: float | None, scores=None, summary=None,
            note: str = "") -> Node:
        """Attach an edit. A score of None or NaN records a rejected one, with the reason in `note`."""
        parent = parent.id if isinstance(parent, Node) else parent
        if self.nodes and parent not in range(len(self.nodes)):
            raise ValueError(f"No node {parent} in a tree of {len(self.nodes)} nodes.")
        score = None if score is None or math.isnan(score) else float(score)
        scores = None if scores is None else [float(s) for s in scores]
        self.nodes.append(Node(len(self.nodes), parent, instructions, score, scores, 0, list(summary or []), note))
        return self.nodes[-1]

    def scored(self) -> list[Node]:
        """The nodes that may be selected or returned."""
        if nodes := [node for node in self.nodes if node.score is not None]:
            return nodes
        raise ValueError("No node has a score yet: score the seed instructions first.")

    def best(self) -> Node:
        """argmax R̄ over the tree."""
        return max(self.scored(), key=lambda node: (node.score, node.id))

    def select(self, rule: str = "ucb", seed: int = 0) -> Node:
        """The node to edit next; counts the visit. "pareto" draws from `seed` and the round, so resuming repeats it."""
        nodes, log_n = self.scored(), math.log(max(1, self.rounds))
        if rule == "ucb":
            # Over ALL nodes, not only leaves; before the first round there is nothing to explore yet. A new node counts
            # as visited once: with the textbook's infinite bonus it would always be next, and the tree always a chain.
            chosen = max(nodes, key=lambda n: (n.score + self.c * math.sqrt(log_n / max(1, n.visits)), n.id))
        elif rule == "chain":
            chosen = nodes[-1]
        elif rule == "best":
            chosen = self.best()
        elif rule == "pareto":
            chosen = random.Random(f"{seed}/{self.rounds}").choices(*self.pareto_front())[0]
        else:
            raise ValueError(f"Unknown search rule {rule!r}; choose ucb, chain, best or pareto.")
        self.rounds += 1
        chosen.visits += 1
        return chosen

    def pareto_front(self) -> tuple[list[Node], list[int]]:
        """GEPA's candidates and their weights: not dominated, best on at least one problem; on how many they are best.

        A node is dominated if another scores no less on every problem and more on one.
        """
        nodes = self.scored()
        if any(node.scores is None or len(node.scores) != len(nodes[0].scores or []) for node in nodes):
            raise ValueError("The rule pareto needs one score per holdout problem, the same problems for every node.")
        top = [max(column) for column in zip(*(node.scores for node in nodes))]

        def dominated(a: Node) -> bool:
            return any(a.scores != b.scores and all(x <= y for x, y in zip(a.scores, b.scores)) for b in nodes)

        wins = [sum(score == best for score, best in zip(node.scores, top)) for node in nodes]
        front = [(node, won) for node, won in zip(nodes, wins) if won and not dominated(node)]
        return [node for node, _ in front], [won for _, won in front]

    def save(self, path: str | Path) -> None:
        """Write JSON, exactly reversible; first under another name, so that a kill leaves the old file or the new."""
        temporary = Path(f"{path}.tmp")
        temporary.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(vars(self), default=asdict, indent=1, ensure_ascii=False)
        temporary.write_bytes(text.encode("utf-8", "surrogatepass"))  # a lone surrogate stays what it is
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: str | Path) -> EvolutionTree:
        state = json.loads(Path(path).read_bytes().decode("utf-8", "surrogatepass"))
        tree = cls("", None, c=state["c"])
        tree.rounds, tree.nodes = state["rounds"], [Node(**node) for node in state["nodes"]]
        return tree
