"""Learning to Self-Evolve, the method: reward, advantages, loss, tree; and the two models that play the roles.

An *editor* rewrites the instructions that a frozen *solver* works under, and is trained on how much each single edit
helps (Chen et al., arXiv 2603.18620). This file holds everything that needs an equation or a model. It knows nothing of
tasks, files or command lines: problems come in as chats, scores as numbers, and it can be copied away alone.

Symbols of the paper, and the words used here
    π_θ   solver: the frozen model that answers problems         c     instructions (the editable field of the context)
    f_ψ   editor: the policy that writes new instructions        c_0   instructions before an edit;  c_1: after it
    S     summary: k graded problems shown to the editor         R̄(c)  score: mean reward of the solver over a holdout
    G     edits sampled for one start state (a "group")          r     reward of an edit, R̄(c_1) − R̄(c_0)   (eq. 7)
    N     start states in a batch                                A     advantage of an edit: its weight in the gradient
    T     in shapes: tokens of a response                        C     weight of exploration in the tree's UCB rule

Read it in order: what an edit is worth, the loss, the tree, the two models. Below the banner *From here on only
efficiency* stands nothing new: the same log-probs and samples, computed without repeating what rows have in common.

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
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
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
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    DynamicLayer,
    GenerationConfig,
)

Chat = list[dict[str, str]]  # [{"role": "system" | "user" | "assistant", "content": text}, ...]
Group = tuple[Tensor, Sequence[Tensor]]  # a prompt's ids (P,) and its G responses' ids, each (T,)

# ---------------------------------------------------------------------------------------------------------------------
# What an edit is worth
# ---------------------------------------------------------------------------------------------------------------------

# flat, as in the official code: an edit that cannot be used, not −1 − R̄(c_0)
INVALID_REWARD = -1.0


def delta_reward(
    after: Tensor, before: Tensor, valid: Tensor, invalid_reward: float = INVALID_REWARD
) -> Tensor:
    """eq. 7: R̄(c_1) − R̄(c_0), and `invalid_reward` where the edit is not valid. Broadcasts; `after` may be NaN there.

    >>> delta_reward(torch.tensor([0.75, 0.0]), torch.tensor(0.5), torch.tensor([True, False])).tolist()
    [0.25, -1.0]
    """
    return torch.where(valid, after - before, invalid_reward)


def advantages(
    kind: str, after: Tensor, before: Tensor, valid: Tensor, invalid_reward: float = INVALID_REWARD
) -> Tensor:
    """The advantage of each edit, (N, G), from the scores after it (N, G) and before it (N,).

    "delta"  the paper's: the reward as it is. The score before the edit is the baseline (eq. 8-10); nothing is scaled.
    "score"  the paper's counter-example, R̄(c_1) alone: it favours start states that were good already.
    "grpo"   R̄(c_1) minus the mean of its group, divided by the group's standard deviation.
    "line"   ours: the delta minus its least-squares line in R̄(c_0) over the batch. From a bad start there is much to
             gain and from a good one nothing, so doing nothing is a biased guess of the average edit. The line removes
             that, and needs no group: G may be 1.

    >>> after, before = torch.tensor([[1.0, 0.5], [0.5, 0.5]]), torch.tensor([0.5, 0.25])
    >>> valid = torch.ones(2, 2, dtype=torch.bool)
    >>> advantages("delta", after, before, valid).tolist()
    [[0.5, 0.0], [0.25, 0.25]]
    >>> advantages("grpo", after, before, valid).tolist()  # the second group says nothing
    [[0.7071067690849304, -0.7071067690849304], [0.0, 0.0]]
    """
    before = before[:, None].expand_as(after)  # (N, G)
    reward = delta_reward(after, before, valid, invalid_reward)  # (N, G)
    score = torch.where(valid, after, invalid_reward)  # (N, G)
    if kind == "delta":
        return reward
    if kind == "score":
        return score
    if kind == "grpo":
        centred = score - score.mean(1, keepdim=True)
        # (N, 1), unbiased
        variance = centred.square().sum(1, keepdim=True) / max(1, score.shape[1] - 1)
        std = variance.sqrt()
        # equal scores (up to rounding) say nothing
        return torch.where(std > 1e-6, centred / std, 0.0)
    if kind == "line":
        x = before - before.mean()
        y = reward - reward.mean()
        slope = (x * y).sum() / (x * x).sum().clamp(min=1e-12)
        return y - slope * x
    raise ValueError(f"Unknown advantage {kind!r}; choose delta, grpo, score or line.")


def policy_loss(
    logprobs: Sequence[Tensor],
    advantages: Sequence[float] | Tensor,
    n_tokens: int,
    old_logprobs: Sequence[Tensor] | None = None,
    clip: float = 0.2,
) -> Tensor:
    """Clipped policy-gradient loss of some responses, one advantage each: sum over tokens / `n_tokens`.

    `logprobs` holds one tensor (T,) per response. `n_tokens` counts the response tokens of the WHOLE batch, so the
    losses of its micro-batches add up. Every token weighs the same: no 1/|o| per response, which would favour long
    failures. Without `old_logprobs` the batch is on-policy: the ratio is 1, the clip never acts, and the gradient is
    −A ∇log p. That is all of reinforcement learning here: likelier where A > 0, less likely where A < 0.

    >>> two, one = torch.tensor([-1.0, -2.0]), torch.tensor([-0.5])  # the fourth token is in another micro-batch
    >>> policy_loss([two, one], [1.0, -1.0], n_tokens=4).item()
    -0.25
    """
    new = torch.cat(list(logprobs))  # (tokens,)
    if old_logprobs is None:
        old = new.detach()
    else:
        old = torch.cat(list(old_logprobs)).detach()
    weights = []
    # each token bears its response's advantage
    for response, advantage in zip(logprobs, advantages, strict=True):
        weights.append(torch.full_like(response.detach(), float(advantage)))
    weight = torch.cat(weights)  # (tokens,)
    ratio = torch.exp(new - old)
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return -torch.minimum(ratio * weight, clipped * weight).sum() / n_tokens


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
    summary: list[Any] = field(default_factory=list)  # S: the graded problems that the editor saw
    note: str = ""  # why an edit was rejected


class EvolutionTree:
    """All versions of the instructions, and which one to edit next. Ties go to the newest node, in every rule."""

    def __init__(
        self, instructions: str, score: float | None, scores=None, c: float = 2.0, summary=None
    ) -> None:
        """The seed instructions are node 0. `c` is C of the UCB rule, 2 in the paper; 0 is best-first."""
        self.c = c
        self.rounds = 0  # N: the selections so far
        self.nodes: list[Node] = []
        self.add(None, instructions, score, scores, summary)

    def select(self, rule: str = "ucb", seed: int = 0) -> Node:
        """The node to edit next; counts the visit. "pareto" draws from `seed` and the round, so resuming repeats it."""
        if rule == "ucb":
            chosen = max(self.scored(), key=lambda node: (self.upper_bound(node), node.id))
        elif rule == "chain":
            chosen = self.scored()[-1]
        elif rule == "best":
            chosen = self.best()
        elif rule == "pareto":
            nodes, weights = self.pareto_front()
            chosen = random.Random(f"{seed}/{self.rounds}").choices(nodes, weights)[0]
        else:
            raise ValueError(f"Unknown search rule {rule!r}; choose ucb, chain, best or pareto.")
        self.rounds += 1
        chosen.visits += 1
        return chosen

    def upper_bound(self, node: Node) -> float:
        """R̄_n + C sqrt(ln N / v_n): what a node has shown, and what it may yet be good for.

        Compared over ALL nodes, not only leaves: that is how the search steps back from a bad edit. A new node counts
        as visited once: with the textbook's infinite bonus it would always be next, and the tree always a chain.
        """
        # before the first round there is nothing to explore
        log_n = math.log(max(1, self.rounds))
        return node.score + self.c * math.sqrt(log_n / max(1, node.visits))

    def best(self) -> Node:
        """argmax R̄ over the tree."""
        return max(self.scored(), key=lambda node: (node.score, node.id))

    def scored(self) -> list[Node]:
        """The nodes that may be selected or returned, oldest first."""
        nodes = [node for node in self.nodes if node.score is not None]
        if not nodes:
            raise ValueError("No node has a score yet: score the seed instructions first.")
        return nodes

    def add(
        self,
        parent: Node | int | None,
        instructions: str,
        score: float | None,
        scores=None,
        summary=None,
        note: str = "",
    ) -> Node:
        """Attach an edit. A score of None or NaN records a rejected one, with the reason in `note`."""
        if isinstance(parent, Node):
            parent = parent.id
        if self.nodes and parent not in range(len(self.nodes)):
            raise ValueError(f"No node {parent} in a tree of {len(self.nodes)} nodes.")
        if score is not None:
            score = None if math.isnan(score) else float(score)
        if scores is not None:
            scores = [float(each) for each in scores]
        node = Node(
            len(self.nodes), parent, instructions, score, scores, 0, list(summary or []), note
        )
        self.nodes.append(node)
        return node

    def pareto_front(self) -> tuple[list[Node], list[int]]:
        """GEPA's candidates and their weights: not dominated, best on at least one problem; on how many they are best.

        A node is dominated if another scores no less on every problem and more on one.
        """
        nodes = self.scored()
        for node in nodes:
            if node.scores is None or len(node.scores) != len(nodes[0].scores or []):
                raise ValueError(
                    "The rule pareto needs one score per holdout problem, the same for every node."
                )
        # per problem, the best score
        top = [max(column) for column in zip(*(node.scores for node in nodes))]
        front: list[Node] = []
        weights: list[int] = []
        for node in nodes:
            wins = sum(score == best for score, best in zip(node.scores, top))
            if wins and not any(dominates(other, node) for other in nodes):
                front.append(node)
                weights.append(wins)
        return front, weights

    def save(self, path: str | Path) -> None:
        """Write JSON, exactly reversible; first under another name, so that a kill leaves the old file or the new."""
        temporary = Path(f"{path}.tmp")
        temporary.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(vars(self), default=asdict, indent=1, ensure_ascii=False)
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: str | Path, answer_type: type | None = None) -> EvolutionTree:
        """A saved tree. `answer_type(**answer)` is made of each element of a summary; None leaves them dicts."""
        state = json.loads(Path(path).read_text(encoding="utf-8"))
        tree = cls("", None, c=state["c"])
        tree.rounds = state["rounds"]
        tree.nodes = [Node(**node) for node in state["nodes"]]
        if answer_type is not None:
            for node in tree.nodes:
                node.summary = [answer_type(**answer) for answer in node.summary]
        return tree


def dominates(a: Node, b: Node) -> bool:
    """Whether `a` scores no less than `b` on every problem, and more on one."""
    return a.scores != b.scores and all(x >= y for x, y in zip(a.scores, b.scores))


# ---------------------------------------------------------------------------------------------------------------------
# Log-probs and samples, the plain way: one row per response, right for any causal model
# ---------------------------------------------------------------------------------------------------------------------


def plain_logprobs(
    model, prompt_ids: Tensor, responses: Sequence[Tensor], temperature: float = 1.0
) -> list[Tensor]:
    """log p of every response token under the prompt: one (T,) float32 tensor per response, differentiable.

    This is the definition. `logprobs`, below, gives the same numbers and computes the prompt once for all responses.
    `temperature` must be the one the responses were sampled with: the policy gradient is that of the sampling policy.
    """
    check_scorable([(prompt_ids, responses)], temperature)
    out = []
    for response in responses:
        row = torch.cat([prompt_ids, response]).to(model.device)  # (P + T,)
        # (T + 1, V)
        logits = model(row[None], use_cache=False, logits_to_keep=len(response) + 1).logits[0]
        # the logits at one token are about the next: the last ones are about nobody
        logits = logits[:-1]
        out.append(token_logprobs(logits, row[len(prompt_ids) :], temperature))
    return out


def token_logprobs(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """log softmax(logits / temperature) at the targets: (..., V) and (...) -> (...), float32 or better."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    negative = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none")
    return -negative.view_as(targets)


def check_scorable(groups: Sequence[Group], temperature: float) -> None:
    """ValueError, in a sentence, for what has no log-probs."""
    if temperature <= 0:
        raise ValueError(
            f"temperature is {temperature}; greedy sampling has no log-probs: use one above 0."
        )
    for prompt, responses in groups:
        if len(prompt) == 0 or len(responses) == 0 or min(map(len, responses)) == 0:
            raise ValueError("Every group needs a prompt and responses of at least one token each.")


@torch.no_grad()
def plain_sample(
    model, rows: Sequence[Sequence[int]], eos: list[int], pad: int, **options
) -> list[Tensor]:
    """One sampled response per row of prompt ids: the ids drawn, up to the first end of sequence, included. (T,) each.

    This is the definition: `generate` on left-padded rows. `options` are generate's own (max_new_tokens, do_sample,
    temperature, top_p, top_k). `shared_sample`, below, draws the same and computes once what rows have in common.
    """
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad)  # (rows, P)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, longest - len(row) :] = torch.tensor(row)
        mask[i, longest - len(row) :] = 1
    with blank_generation(model, eos, pad):
        out = model.generate(ids.to(model.device), attention_mask=mask.to(model.device), **options)
    return [until_end(row, eos) for row in out[:, longest:].cpu()]


@contextmanager
def blank_generation(model, eos: list[int], pad: int) -> Iterator[None]:
    """Inside, the model is in eval mode and only the caller's options steer `generate`; afterwards all is as before.

    A checkpoint's generation_config fills whatever the caller leaves open: a top_k, penalties or length limits of its
    own would make the sampler another policy than the one whose log-probs are learned from. Eval mode: no dropout, and
    no gradient checkpointing, which would silently drop the cache.
    """
    mode = model.training
    config = model.generation_config
    model.eval()
    # remove_invalid_values: a NaN among the logits must not end the process (on a GPU it would).
    model.generation_config = GenerationConfig(
        eos_token_id=eos or None,
        pad_token_id=pad,
        remove_invalid_values=True,
        repetition_penalty=1.0,
    )
    try:
        yield
    finally:
        model.generation_config = config
        model.train(mode)


def until_end(row: Tensor, eos: list[int]) -> Tensor:
    """The ids up to the first end of sequence, included; all of them if there is none.

    >>> until_end(torch.tensor([5, 1, 6, 1]), eos=[1, 2]).tolist()
    [5, 1]
    """
    ends = torch.isin(row, torch.tensor(eos, dtype=row.dtype)).nonzero()
    if len(ends) == 0:
        return row
    return row[: int(ends[0]) + 1]


# ---------------------------------------------------------------------------------------------------------------------
# The two models: one on this machine, one behind a server
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Sample:
    """One sampled response. `ids` are the very ids that were sampled, first EOS included, without padding."""

    text: str
    ids: Tensor | None  # (T,) on the CPU; None for a remote model
    prompt_ids: Tensor | None  # (P,)
    truncated: bool  # cut off: no end of sequence within max_new_tokens
    error: str = ""  # why there is no response: the words of the server that refused it


@dataclass
class Usage:
    """What a model has been asked for so far, and how it went."""

    answers: int = 0  # responses asked for
    failed: int = 0  # ... that never came
    cut: int = 0  # ... that were cut off at the token limit
    # ... in which nobody could read an answer; counted by evolve.py, which knows the graders
    unreadable: int = 0
    tokens_read: int = 0
    tokens_written: int = 0


class LocalModel:
    """A causal language model and its tokenizer. `sample` never changes the weights or the train/eval mode."""

    def __init__(self, model, tokenizer, max_batch_tokens: int = 65536) -> None:
        """`max_batch_tokens` bounds rows x (longest prompt + max_new_tokens), which is what fills the memory."""
        if getattr(tokenizer, "chat_template", None) is None:
            raise ValueError(
                "The tokenizer has no chat template: set its chat_template or use an instruct model."
            )
        self.model = model
        self.tokenizer = tokenizer
        self.max_batch_tokens = max_batch_tokens
        self.usage = Usage()
        self.eos = end_ids(model, tokenizer)
        self.pad = tokenizer.pad_token_id
        if self.pad is None:
            self.pad = self.eos[0] if self.eos else 0
        self.controls = control_pattern(tokenizer)

    def sample(
        self,
        chats: Sequence[Chat],
        n: int = 1,
        max_new_tokens: int = 512,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
    ) -> list[list[Sample]]:
        """n samples for each chat, in the order of the chats. `temperature=0` is greedy: then equal chats run once.

        `top_k=0` and `top_p=1` cut nothing off; leave them so when the samples are to be learned from, since
        `logprobs` scores the uncut distribution. Draws come from torch's global generator.
        """
        prompts = [tuple(self.encode(chat)) for chat in chats]
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
        # Sorted, so that rows which begin alike are neighbours: they share their prefill, and differ little in length.
        if temperature > 0:
            rows = sorted(prompts * n)
            options |= {"temperature": temperature, "top_p": top_p, "top_k": top_k}
        else:
            rows = sorted(set(prompts))
        drawn: dict[tuple[int, ...], list[Tensor]] = {prompt: [] for prompt in prompts}
        for row, ids in zip(rows, self.draw(rows, options)):
            drawn[row].append(ids)
        out = []
        for prompt in prompts:
            if temperature > 0:
                responses = [drawn[prompt].pop() for _ in range(n)]
            else:
                responses = [drawn[prompt][0]] * n
            out.append([self.as_sample(prompt, ids) for ids in responses])
        return out

    def as_sample(self, prompt: tuple[int, ...], ids: Tensor) -> Sample:
        """A response as text, counted."""
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        sample = Sample(text, ids, torch.tensor(prompt), truncated=int(ids[-1]) not in self.eos)
        self.usage.answers += 1
        self.usage.cut += sample.truncated
        self.usage.tokens_read += len(prompt)
        self.usage.tokens_written += len(ids)
        return sample

    def draw(self, rows: list[tuple[int, ...]], options: dict) -> list[Tensor]:
        """The sampled ids of each row, batch by batch. A batch that does not fit in memory is halved."""
        pending = self.batches(rows, options["max_new_tokens"])
        out: list[Tensor] = []
        while pending:
            batch = pending.pop(0)
            samples: list[Tensor] = []
            try:
                samples = shared_sample(self.model, batch, self.eos, self.pad, **options)
            except torch.OutOfMemoryError:
                if len(batch) == 1:  # cannot be halved
                    raise
            # not within `except`, whose traceback still holds the batch's tensors
            if not samples:
                torch.cuda.empty_cache()
                middle = len(batch) // 2
                pending[:0] = [batch[:middle], batch[middle:]]
            out += samples
        return out

    def batches(self, rows: list[tuple[int, ...]], new: int) -> list[list[tuple[int, ...]]]:
        """The rows in their order, in batches of at most `max_batch_tokens` tokens, padding and new ones included."""
        out: list[list[tuple[int, ...]]] = []
        longest = 0
        for row in rows:
            longest = max(longest, len(row))
            if not out or (len(out[-1]) + 1) * (longest + new) > self.max_batch_tokens:
                out.append([])
                longest = len(row)
            out[-1].append(row)
        return out

    def encode(self, chat: Chat) -> list[int]:
        """Token ids of a chat up to where the answer begins.

        Contents come from models and data: a `<|im_start|>` in there must stay text, else instructions could forge a
        role. So control strings in contents are swapped for stand-ins before the template runs, and swapped back once
        the template's own control strings are cut out.
        """
        contents = "".join(message["content"] for message in chat)
        forged = sorted(set(self.controls.findall(contents)))
        if not forged:
            return self.tokenizer(self.render(chat), add_special_tokens=False)["input_ids"]
        # private-use characters
        unused = (chr(code) for code in range(0xE000, 0xF900) if chr(code) not in contents)
        stand_in = dict(zip(forged, unused))
        masked = []
        for message in chat:
            content = self.controls.sub(lambda hit: stand_in[hit[0]], message["content"])
            masked.append(message | {"content": content})
        original = str.maketrans({mark: control for control, mark in stand_in.items()})
        forged_ids = self.tokenizer.convert_tokens_to_ids(forged)
        ids: list[int] = []
        # text, control, text, ..., text
        for i, piece in enumerate(self.controls.split(self.render(masked))):
            if i % 2:  # one that the template wrote
                ids.append(self.tokenizer.convert_tokens_to_ids(piece))
                continue
            text = piece.translate(original)
            plain = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)[
                "input_ids"
            ]
            # A vocabulary of whole words cannot spell a control string in pieces: there it is dropped.
            ids += [token for token in plain if token not in forged_ids]
        return ids

    def render(self, chat: Chat) -> str:
        """The chat as text, template applied once; a system message joins the first user's where none is allowed."""
        try:
            return self.tokenizer.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
        except TemplateError:
            if len(chat) < 2 or chat[0]["role"] != "system":
                raise
            content = chat[0]["content"] + "\n\n" + chat[1]["content"]
            return self.render([{"role": "user", "content": content}, *chat[2:]])


def end_ids(model, tokenizer) -> list[int]:
    """The ids that end a response, sorted: the checkpoint's, and the tokenizer's (base models lack the chat's own)."""
    ends = model.generation_config.eos_token_id  # an int, a list or None
    if not isinstance(ends, list):
        ends = [ends]
    return sorted({*ends, tokenizer.eos_token_id} - {None})


def control_pattern(tokenizer) -> re.Pattern:
    """What matches the tokenizer's control strings, such as <|im_start|>, longest first; and else nothing."""
    controls = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    controls.sort(key=len, reverse=True)
    if not controls:
        return re.compile("((?!))")
    return re.compile(f"({'|'.join(map(re.escape, controls))})")


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

    def __init__(
        self,
        base_url: str,
        model: str | None = None,
        api_key: str | None = None,
        *,
        timeout: float = 600.0,
        concurrency: int = 16,
        retries: int = 5,
        backoff: float = 1.0,
        extra: dict | None = None,
    ) -> None:
        # "no-key", because without any key InferenceClient would send this machine's Hugging Face token to the server.
        key = (
            api_key or os.environ.get("LSE_API_KEY") or os.environ.get("OPENAI_API_KEY") or "no-key"
        ).strip()
        # The HTTP library would refuse such a key, and quote it; a URL with an @ or ? may hold a password or a key.
        if not re.fullmatch("[!-~]+", key) or not re.fullmatch(r"https?://[^\s@?]+", base_url):
            raise ValueError(
                "the URL looks like http://host:8000/v1, and the key is one ASCII word in LSE_API_KEY"
            )
        self.base_url = (
            base_url.rstrip("/").removesuffix("/chat/completions").removesuffix("/v1") + "/v1"
        )
        self._client = InferenceClient(base_url=self.base_url, api_key=key, timeout=timeout)
        self._key, self.timeout, self.concurrency = key, timeout, concurrency
        self.retries, self.backoff, self.extra = retries, backoff, extra or {}
        self.usage = Usage()
        # refused: settings that the model has turned down
        self._lock, self._refused = Lock(), set[str]()
        self.model = model or self._ask({})

    def sample(
        self,
        chats: Sequence[Chat],
        n: int = 1,
        max_new_tokens: int = 512,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
    ) -> list[list[Sample]]:
        """n samples for each chat, in order; temperature 0 is greedy. top_k = 0 is not sent: OpenAI has no top_k.

        Each sample is a request of its own, since not every server knows OpenAI's n.
        """
        body = {
            "model": self.model,
            "max_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k or None,
            "stream": False,
            **self.extra,
        }
        # an error cancels the requests that have not begun
        with ThreadPoolExecutor(self.concurrency) as pool:
            found = list(
                pool.map(
                    self._ask, [{**body, "messages": chat} for chat in chats for _ in range(n)]
                )
            )
        return [found[i * n : (i + 1) * n] for i in range(len(chats))]

    def _ask(self, body: dict) -> Any:
        """One chat completion, retried: a Sample. For an empty body the name of the first model that the server lists.

        GPT-5 turns down a temperature: a setting that a 400 names is left out from then on, with a warning.
        """
        url = f"{self.base_url}/{'chat/completions' if body else 'models'}"
        for attempt in range(self.retries + 1):
            sent = {
                name: value
                for name, value in body.items()
                if name not in self._refused and value is not None
            }
            if "max_tokens" in self._refused:  # the name that OpenAI's reasoning models insist on
                sent["max_completion_tokens"] = body["max_tokens"]
            try:
                return self._complete(sent) if body else self._first_model()
            # the last four: odd JSON
            except (HTTPError, ValueError, LookupError, TypeError, AttributeError) as error:
                # huggingface_hub stumbles over an error body that is no JSON object: the response is one level down
                response = getattr(error, "response", None) or getattr(
                    error.__context__, "response", None
                )
                status, after, said = (
                    0,
                    "",
                    f"{error or type(error).__name__} {getattr(error, 'doc', '')}",
                )
                if response is not None:
                    status, after = response.status_code, response.headers.get("retry-after", "")
                    # str(json): without JSON's escapes, in which the key might hide
                    with suppress(ValueError):
                        said = str(response.json())
            message = f"{status or 'no answer'}: {said.replace(self._key, '***').strip()[:500]}"
            named = [
                name
                for name in ("max_tokens", "temperature", "top_p", "top_k")
                if name in sent and name in said
            ]
            if named and status in (400, 422):
                self._refused.add(named[0])
                warnings.warn(
                    f"{self.model} turns down {named[0]}, so it is left out ({message})",
                    stacklevel=2,
                )
            elif 400 <= status < 500 and status not in (408, 409, 425, 429):
                break  # it cannot pass
            # jitter of its own making: retries must not move a seeded run
            elif attempt < self.retries:
                wait = self.backoff * 2**attempt * random.SystemRandom().uniform(0.5, 1.5)
                time.sleep(min(max(wait, int(after) if after.isdecimal() else 0), 60.0))
        raise ConnectionError(
            f"{url} failed, try {attempt + 1} of {self.retries + 1}: {message}\nWhat to do: see that "
            "the server is up, check URL, model name, settings, and the key in LSE_API_KEY"
        )

    def _complete(self, body: dict) -> Sample:
        """One request, counted. Without content (still reasoning at the limit, or filtered) the answer is empty."""
        rest = {name: value for name, value in body.items() if name not in ("messages", "model")}
        reply = self._client.chat_completion(body["messages"], model=body["model"], extra_body=rest)
        if not reply.get("choices"):
            raise ValueError(f"a reply without choices: {dict(reply)}")
        choice, usage = reply["choices"][0], reply.get("usage") or {}
        text, cut = choice["message"]["content"] or "", choice["finish_reason"] == "length"
        with self._lock:
            self.usage.answers += 1
            self.usage.cut += cut
            self.usage.tokens_read += usage.get("prompt_tokens") or 0
            self.usage.tokens_written += usage.get("completion_tokens") or 0
        text = text.encode("utf-8", "replace").decode()  # lone surrogates cannot be saved
        # a server may echo the key, and answers are saved; "EMPTY" and the like are no secrets
        if len(self._key) > 15:
            text = text.replace(self._key, "***")
        return Sample(text, None, None, cut)

    def _first_model(self) -> str:
        headers = {"Authorization": f"Bearer {self._key}"}
        reply = get_session().get(f"{self.base_url}/models", headers=headers, timeout=self.timeout)
        hf_raise_for_status(reply)
        return reply.json()["data"][0]["id"]


# ---------------------------------------------------------------------------------------------------------------------
# From here on only efficiency. Sampling: what rows have in common is computed once
# ---------------------------------------------------------------------------------------------------------------------


class RoomyLayer(DynamicLayer):
    """Keys and values of one layer, with room for what will be sampled.

    A DynamicLayer copies all it holds at every new token: behind a long prompt, half of the time to sample. This one
    is copied once, from `layer`, whose row `owner[i]` becomes row i.
    """

    def __init__(self, layer: DynamicLayer, owner: Tensor, room: int) -> None:
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self.used = layer.keys.shape[2]
        self.all_keys = F.pad(layer.keys[owner], (0, 0, 0, room))  # (rows, heads, L + room, d)
        self.all_values = F.pad(layer.values[owner], (0, 0, 0, room))
        self.show()

    def show(self) -> None:
        self.keys = self.all_keys[:, :, : self.used]
        self.values = self.all_values[:, :, : self.used]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        start = self.used
        self.used += key_states.shape[2]
        self.all_keys[:, :, start : self.used] = key_states
        self.all_values[:, :, start : self.used] = value_states
        self.show()
        return self.keys, self.values


@torch.no_grad()
def shared_sample(
    model, rows: Sequence[Sequence[int]], eos: list[int], pad: int, **options
) -> list[Tensor]:
    """What `plain_sample` draws; the prefix of all rows is prefilled once, then the rest of every distinct prompt.

    `rows` must be sorted. Layout of a row: prefix, rest, padding, last prompt token. Padding that follows needs no mask
    while prefilling; later the mask hides it, and positions count real tokens only (behind a sliding window, padding
    counts as well). The last token is left to `generate`, which must start from one.
    """
    distinct = sorted(set(rows))
    place = {prompt: i for i, prompt in enumerate(distinct)}
    # (rows,) -> distinct prompt
    owner = torch.tensor([place[row] for row in rows], device=model.device)
    # in sorted rows, first and last decide
    prefix = len(os.path.commonprefix([rows[0][:-1], rows[-1][:-1]]))
    longest = max(map(len, distinct))
    padded_ids = []
    padded_mask = []
    for prompt in distinct:
        gap = longest - len(prompt)
        padded_ids.append([*prompt[:-1], *[pad] * gap, prompt[-1]])
        padded_mask.append([1] * (len(prompt) - 1) + [0] * gap + [1])
    ids = torch.tensor(padded_ids, device=model.device)  # (distinct, L)
    mask = torch.tensor(padded_mask, device=model.device)
    with blank_generation(model, eos, pad):
        cache = DynamicCache(config=model.config)
        if prefix:
            model(ids[:1, :prefix], past_key_values=cache, logits_to_keep=1)
            cache.batch_repeat_interleave(len(distinct))
        if prefix < longest - 1:
            model(ids[:, prefix:-1], past_key_values=cache, logits_to_keep=1)
        for i, layer in enumerate(cache.layers):
            if type(layer) is DynamicLayer and layer.is_initialized:
                cache.layers[i] = RoomyLayer(layer, owner, options["max_new_tokens"])
            else:  # a sliding window, say: it stays small by itself
                layer.batch_select_indices(owner)
        out = model.generate(
            ids[owner], attention_mask=mask[owner], past_key_values=cache, **options
        )
    return [until_end(row, eos) for row in out[:, longest:].cpu()]


# ---------------------------------------------------------------------------------------------------------------------
# Learning: a prompt shared by G responses is computed once
# ---------------------------------------------------------------------------------------------------------------------


def logprobs(
    model, prompt_ids: Tensor, responses: Sequence[Tensor], temperature: float = 1.0
) -> list[Tensor]:
    """What `plain_logprobs` returns, with the prompt computed once: one (T,) float32 tensor per response."""
    return group_logprobs(model, [(prompt_ids, responses)], temperature)[0]


def group_logprobs(model, groups: Sequence[Group], temperature: float = 1.0) -> list[list[Tensor]]:
    """`logprobs` for several (prompt_ids, responses) in one forward pass: a list of (T,) tensors per group.

    The caller chooses how many groups fit in memory. The mean of −log p over tokens sampled at this temperature (top_p
    1, top_k 0) is an unbiased estimate of the policy's entropy.
    """
    check_scorable(groups, temperature)
    packed = pack(groups)
    positions = packed.positions.to(model.device)
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    if window is not None and positions.max() >= window:
        raise ValueError(
            f"The model attends to {window} tokens at a time; prompt and response must fit in there."
        )
    # stays on: a checkpointed layer runs again in backward
    model.set_attn_implementation("shared_prompt")
    targets = packed.targets.to(model.device)  # (B, R)
    logits = model(
        packed.ids.to(model.device),
        position_ids=positions,
        attention_mask=packed.mask.to(model.device),
        use_cache=False,
        logits_to_keep=targets.shape[1],
    ).logits  # (B, R, V)
    logps = token_logprobs(logits, targets, temperature)  # (B, R)
    out = []
    for row, (_, responses) in zip(logps, groups):
        lengths = [len(response) for response in responses]
        out.append(list(row[: sum(lengths)].split(lengths)))
    return out


@dataclass
class Packed:
    """Several groups as one batch, a row each: P prompt tokens, then R tokens whose successors are scored."""

    ids: Tensor  # (B, P + R)
    positions: Tensor  # (B, P + R)
    mask: Tensor  # (B, 1, R, P + R), True where a response token may look
    targets: Tensor  # (B, R)


def pack(groups: Sequence[Group]) -> Packed:
    """One row per group: the prompt without its last token; then, per response, that token and all response tokens but
    the last. So the second part holds exactly the tokens whose successors are scored: no prompt logits are computed.

    Both parts are padded on the right, to the longest prompt and to the most response tokens.

    >>> packed = pack([(torch.tensor([5, 6, 7]), [torch.tensor([1, 2]), torch.tensor([3])])])
    >>> packed.ids.tolist(), packed.positions.tolist(), packed.targets.tolist()
    ([[5, 6, 7, 1, 7]], [[0, 1, 2, 3, 2]], [[1, 2, 3]])
    >>> packed.mask[0, 0].int().tolist()
    [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 0, 0, 1]]
    """
    prompts: list[Tensor] = []
    inputs: list[Tensor] = []
    targets: list[Tensor] = []
    places: list[Tensor] = []  # of each response token: its position in the text
    owners: list[Tensor] = []  # of each response token: the number of its response
    for prompt, responses in groups:
        prompt = prompt.cpu()
        responses = [response.cpu() for response in responses]
        prompts.append(prompt[:-1])
        inputs.append(
            torch.cat([torch.cat([prompt[-1:], response[:-1]]) for response in responses])
        )
        targets.append(torch.cat(responses))
        places.append(
            torch.cat([len(prompt) - 1 + torch.arange(len(response)) for response in responses])
        )
        owners.append(
            torch.cat([torch.full_like(response, i) for i, response in enumerate(responses)])
        )
    prompt_ids = right_pad(prompts)  # (B, P)
    owner = right_pad(owners, -1)  # (B, R)
    lengths = torch.tensor([len(prompt) for prompt in prompts])  # (B,)
    prompt_places = torch.arange(prompt_ids.shape[1])  # (P,)
    # (B, R, R): the same response, and not later
    own = (owner[:, :, None] == owner[:, None]).tril()
    real = prompt_places < lengths[:, None]  # (B, P): the prompt without its padding
    sees = real[:, None].expand(-1, own.shape[1], -1)  # (B, R, P)
    return Packed(
        ids=torch.cat([prompt_ids, right_pad(inputs)], 1),
        positions=torch.cat([prompt_places.expand_as(prompt_ids), right_pad(places)], 1),
        mask=torch.cat([sees, own], 2)[:, None],
        targets=right_pad(targets),
    )


def right_pad(rows: Sequence[Tensor], value: int = 0) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)


def shared_prompt_attention(
    module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs
):
    """Attention over a row [prompt, all its responses]: a response sees the prompt and itself, not the others.

    Such rows are recognised by a mask with fewer queries than the row, (B, 1, R, P + R): the prompt's P queries need
    none, they are plain causal attention. That saves the (P + R)² mask and most of the work, and there is no cache,
    which gradient checkpointing would silently drop. All other calls are plain sdpa.
    """
    sdpa = AttentionInterface()["sdpa"]
    if attention_mask is None or attention_mask.shape[2] == query.shape[2]:
        return sdpa(module, query, key, value, attention_mask, **kwargs)
    p = query.shape[2] - attention_mask.shape[2]
    prompt, _ = sdpa(module, query[:, :, :p], key[:, :, :p], value[:, :, :p], None, **kwargs)
    responses, _ = sdpa(module, query[:, :, p:], key, value, attention_mask, **kwargs)
    return torch.cat([prompt, responses], 1), None  # (B, P + R, heads, d)


AttentionInterface.register("shared_prompt", shared_prompt_attention)
AttentionMaskInterface.register("shared_prompt", AttentionMaskInterface()["sdpa"])


# ---------------------------------------------------------------------------------------------------------------------
# Learning: steps that bf16 would lose
# ---------------------------------------------------------------------------------------------------------------------


class MasterAdamW:
    """AdamW whose steps are not lost in bf16.

    At lr 1e-6 a step is smaller than half the gap between neighbouring bf16 numbers, and 98% of the weights would never
    move. So parameters in 16 bits get float32 masters, and the moments, on the CPU: the GPU holds 2 + 2 bytes per
    parameter, weight and gradient. Parameters in float32 are their own masters, and this is plain AdamW.
    """

    def __init__(
        self, model, lr: float, max_norm: float = 1.0, weight_decay: float = 0.0, betas=(0.9, 0.999)
    ) -> None:
        """`max_norm` clips the norm of the whole gradient. The learning rate may be changed in `adamw.param_groups`."""
        self.max_norm = max_norm
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.masters: list[Tensor] = []
        self.copied: list[tuple[Tensor, Tensor]] = []  # (parameter in 16 bits, its master)
        for param in self.params:
            if param.dtype.itemsize < 4:
                master = param.detach().cpu().float()
                self.copied.append((param, master))
            else:
                master = param
            self.masters.append(master)
        self.adamw = torch.optim.AdamW(
            self.masters, lr=lr, betas=betas, weight_decay=weight_decay, fused=True
        )

    @torch.no_grad()
    def step(self) -> float:
        """Clip, step, clear the gradients; returns their norm before clipping. Not finite: the step was skipped."""
        norm = float(torch.nn.utils.clip_grad_norm_(self.params, self.max_norm))
        if math.isfinite(norm):
            for param, master in self.copied:
                master.grad = None if param.grad is None else param.grad.cpu().float()
            self.adamw.step()
            for param, master in self.copied:
                param.copy_(master)
        for tensor in [*self.params, *self.masters]:
            tensor.grad = None
        return norm

    def state_dict(self) -> dict:
        """The moments and the masters, from which the model's own weights follow."""
        return {
            "adamw": self.adamw.state_dict(),
            "masters": [master.detach() for master in self.masters],
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        self.adamw.load_state_dict(state["adamw"])
        for param, master, saved in zip(self.params, self.masters, state["masters"], strict=True):
            master.copy_(saved)
            param.copy_(master)
