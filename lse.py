"""Learning to Self-Evolve, the method: reward, advantages, loss, tree; and the two models that play the roles.

An *editor* rewrites the instructions that a frozen *solver* works under, and is trained on how much each single edit
helps (Chen et al., arXiv 2603.18620). This file holds everything that needs an equation or a model. It knows nothing of
tasks, files or command lines: problems come in as chats, scores as numbers, and it can be copied away alone.

Symbols of the paper, and the words used here
    π_θ   solver: the frozen model that answers problems         c     instructions (the editable field of the context)
    f_ψ   editor: the policy that writes new instructions        c_0   instructions before an edit;  c_1: after it
    S     summary: k graded problems shown to the editor         R̄(c)  score: share of a holdout that is answered right
    G     edits sampled for one start state (a "group")          r     reward of an edit, R̄(c_1) − R̄(c_0)   (eq. 7)
    N     start states in a batch                                A     advantage of an edit: its weight in the gradient
    T     in shapes: tokens of a response                        C     weight of exploration in the tree's UCB rule
(In Algorithm 1 the paper uses two of them again: N for the selections so far, T for the rounds.)

Read it in order: what an edit is worth, the loss, the tree, log-probs and samples the plain way, the model on this
machine. Below the banner *From here on only efficiency and plumbing* come the same samples and the same log-probs,
computed without repeating what rows have in common; the check of all this on a run's own model; the optimizer for
16-bit weights; and the model behind a server.

Left out on purpose: a critic, a reference model and its KL, an entropy bonus, reward shaping. The reward already has
its baseline (the score before the edit), and one update per batch keeps the editor near the policy that sampled.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import random
import re
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from email.utils import parsedate_to_datetime
from functools import partial
from itertools import groupby
from pathlib import Path
from threading import Event, Lock
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import torch
import torch.nn.functional as F
from jinja2 import TemplateError
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Cache,
    DynamicCache,
    DynamicLayer,
    GenerationConfig,
    LogitsProcessor,
    StoppingCriteria,
    TopPLogitsWarper,
)

# What transformers reads the hub with; unlike the hub's own client it works under HF_HUB_OFFLINE=1.
try:
    import httpx2 as httpx  # comes with huggingface_hub 2
except ImportError:
    import httpx  # with huggingface_hub 1, which transformers takes as well

Chat = list[dict[str, str]]  # [{"role": "system" | "user" | "assistant", "content": text}, ...]
Group = tuple[Tensor, Sequence[Tensor]]  # a prompt's ids (P,) and its G responses' ids, each (T,)

# ---------------------------------------------------------------------------------------------------------------------
# What an edit is worth
# ---------------------------------------------------------------------------------------------------------------------

# Words for a PyTorch reader without RL. *Policy*: a model that is sampled from, here the editor. *Reward*: one number
# per sample; sampling tokens and running SQL have no derivative, so nothing flows back through it. What has one is log
# f, the log-probability of what was sampled. Seen from supervised learning, a step is cross-entropy on the editor's own
# edits as labels, each weighted by its advantage, which may be negative. The objective is J = E[R̄(c_1) − R̄(c_0)] over
# edits c_1 ~ f_ψ(c_0, S_0), and its gradient is
#
#     ∇J = E[A ∇ log f_ψ(c_1 | c_0, S_0)]        with the advantage A = R̄(c_1) − R̄(c_0)        (eq. 8-10)
#
# where log f_ψ of an edit is the sum over its tokens. Subtracting anything that does not depend on c_1, a *baseline*,
# leaves the expectation as it is, since E[∇ log f] = 0, and can lower the variance. The score before the edit is such
# a baseline, known for free. So R̄(c_1) alone has the same expected gradient; but in a batch of finite size it pushes
# up every edit of a good start, helpful or not, and that is noise.

# The same for all invalid edits, as in the official code; train.py takes a milder one, see `invalid_reward` there.
INVALID_REWARD = -1.0


def delta_reward(
    after: Tensor, before: Tensor, valid: Tensor, invalid_reward: float = INVALID_REWARD
) -> Tensor:
    """eq. 7: R̄(c_1) − R̄(c_0), and `invalid_reward` where the edit is not valid. Broadcasts; `after` may be NaN there.

    In units of the score, so from −1 to 1. The raw score would prefer an edit from 80% to 70%, which earns 0.7, to one
    from 30% to 60%, which earns 0.6; their differences are −0.1 and 0.3.

    >>> delta_reward(torch.tensor([0.75, 0.0]), torch.tensor(0.5), torch.tensor([True, False])).tolist()
    [0.25, -1.0]
    """
    return torch.where(valid, after - before, invalid_reward)


def advantages(
    kind: str, after: Tensor, before: Tensor, valid: Tensor, invalid_reward: float = INVALID_REWARD
) -> Tensor:
    """The advantage of each edit, (N, G), from the scores after it (N, G) and before it (N,).

    An advantage says how much better than expected an edit did; the loss multiplies log-probs by it. The kinds differ
    in what is expected, the baseline. "grpo" and "line" take theirs from the edits themselves, each of which has a
    small part in its own: so they leave the expected gradient nearly as it is, and not quite.

    "delta"  the paper's: A = r, the reward as it is. Nothing is scaled.
    "score"  the paper's counter-example, A = R̄(c_1): without a baseline.
    "grpo"   R̄(c_1) minus the mean of its group, divided by the group's standard deviation. An invalid edit counts as
             a score of `invalid_reward`, so it always loses to those that can be read.
    "line"   ours: A = r − (a + b R̄(c_0)), with a and b fitted to the batch by least squares. From a bad start there is
             much to gain, from a good one nothing: so the average delta falls with R̄(c_0), and edits of bad starts are
             praised whatever they do. The fitted line takes that out, and needs no group: G may be 1.

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
        # Dividing by the standard deviation is a choice: a group that differs by 0.01 counts as much as one that
        # differs by 1. Equal scores say nothing; in float32 they can differ in their last digit, hence the 1e-6.
        return torch.where(std > 1e-6, centred / std, 0.0)
    if kind == "line":
        x = before - before.mean()
        y = reward - reward.mean()
        # The clamp is for a batch in which all starts score alike: there is no slope, and the mean alone is taken out.
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
    losses of its micro-batches add up. Every token weighs the same: dividing by a response's own length would favour
    long failures, whose tokens were each punished less. (∇J is a mean over edits. A mean over tokens is the same but
    for a factor, the tokens of an average edit.) The loss is that of PPO, −min(ratio A, clipped ratio A), where
    ratio = p / p_old for a token. With one update per batch, as in train.py, there is no older policy (`old_logprobs`
    None): the ratio's value is 1, the clip never acts, and its gradient is that of log p, so the loss has the gradient
    −A ∇log p. That is all of reinforcement learning here: likelier where A > 0, less likely where A < 0.

    >>> two, one = torch.tensor([-1.0, -2.0]), torch.tensor([-0.5])  # the fourth token is in another micro-batch
    >>> policy_loss([two, one], [1.0, -1.0], n_tokens=4).item()
    -0.25
    """
    new = torch.cat(list(logprobs))  # (tokens,)
    # Detached: `new - old` is 0, yet its gradient is that of `new`. Where a ratio is 1, its gradient is that of log p.
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
    # The smaller of the two: where the ratio has left 1 ± clip in the direction that A asks for, the gradient is 0.
    # Where it has left it the other way, the unclipped term is the smaller one and leads back. `n_tokens`, not
    # len(new): see above.
    return -torch.minimum(ratio * weight, clipped * weight).sum() / n_tokens


# ---------------------------------------------------------------------------------------------------------------------
# The tree of instructions (Algorithm 1)
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Node:
    """One version of the instructions. `score` None: a rejected edit, kept for the record and never selected.

    Rejected is an edit that is invalid, or that its method did not accept. None, not 0: an edit that nobody scored is
    not one that answered everything wrong.
    """

    id: int
    parent: int | None  # id of the node it was edited from; None for the root
    instructions: str
    score: float | None  # R̄, mean over the holdout
    scores: list[float] | None = None  # of each holdout problem: for "pareto", and the errors of gains
    visits: int = 0  # v: how often it was selected
    summary: list[Any] = field(default_factory=list)  # S: the graded problems that the editor saw
    note: str = ""  # why an edit was rejected


class EvolutionTree:
    """All versions of the instructions, and which one to edit next.

    Among equals the oldest wins, in `best` and the rules "ucb" and "best": an edit must be strictly better to take the
    place of what it edited, and where no edit was better, the seed instructions are the best. "chain" takes the newest,
    "pareto" draws.
    """

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
        if rule == "ucb":  # the paper's
            chosen = max(self.scored(), key=self.upper_bound)  # of equals, max takes the first
        elif rule == "chain":  # the newest, so it goes on from a bad edit as well
            chosen = self.scored()[-1]
        elif rule == "best":  # it never explores
            chosen = self.best()
        elif rule == "pareto":  # GEPA's draw among nodes that are best at something
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
        N rounds and v visits are numbers of selections, scores lie in 0 to 1: so C is in units of the score. At C = 2,
        N = 9 the bonus falls from 2.96 after one visit to 1.71 after three; at C = 0.3 from 0.44 to 0.26.
        """
        # before the first round there is nothing to explore
        log_n = math.log(max(1, self.rounds))
        return node.score + self.c * math.sqrt(log_n / max(1, node.visits))

    def best(self) -> Node:
        """argmax R̄ over the tree, of equals the oldest."""
        return max(self.scored(), key=lambda node: node.score)

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
        # An edit may name its parent by the node itself or by its id; only the root has none.
        if isinstance(parent, Node):
            parent = parent.id
        if self.nodes and parent not in range(len(self.nodes)):
            raise ValueError(f"No node {parent} in a tree of {len(self.nodes)} nodes.")
        # As a score, a NaN would win or lose by its place: no comparison with it is true.
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

        A node is dominated if another scores no less on every problem and more on one. The idea: instructions with a
        lower mean may hold the one rule that solves a problem which no others solve. (GEPA's package prunes further:
        also a node all of whose best problems some other candidates, taken together, solve as well.)

        >>> tree = EvolutionTree("a", 0.5, [1.0, 0.0, 0.5])
        >>> nodes = tree.add(0, "b", 0.5, [0.0, 1.0, 0.5]), tree.add(0, "c", 0.25, [0.0, 0.5, 0.25])
        >>> [node.instructions for node in tree.pareto_front()[0]], tree.pareto_front()[1]
        (['a', 'b'], [2, 2])
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
    """Whether `a` scores no less than `b` on every problem, and more on one. Equal scores dominate neither."""
    return a.scores != b.scores and all(x >= y for x, y in zip(a.scores, b.scores))


# ---------------------------------------------------------------------------------------------------------------------
# Log-probs and samples, the plain way: one row per response, right for any causal model
# ---------------------------------------------------------------------------------------------------------------------


def plain_logprobs(
    model, prompt_ids: Tensor, responses: Sequence[Tensor], temperature: float = 1.0
) -> list[Tensor]:
    """log p of every response token under the prompt: one (T,) float32 tensor per response, differentiable.

    This is the definition. `logprobs`, below, gives the same numbers and computes the prompt once for all responses;
    models that cannot share a prompt, and tests, use this one.
    `temperature` must be the one the responses were sampled with: the policy gradient is that of the sampling policy.

    prompt_ids is (P,), each response (T,), with its end of sequence: that token was drawn like the others, and is
    learned like them. ValueError for an empty prompt or response, or a temperature of 0.
    """
    check_scorable([(prompt_ids, responses)], temperature)
    known = inspect.signature(model.forward).parameters
    out = []
    for response in responses:
        # One row, no padding, no mask. Masks made by `ids != pad` go wrong silently where pad and end of sequence are
        # one token; below, where rows are padded, masks are made of lengths.
        row = torch.cat([prompt_ids, response]).to(model.device)  # (P + T,)
        # Two keyword arguments to save memory, which not every model knows.
        options = {"use_cache": False, "logits_to_keep": len(response) + 1}
        options = {name: value for name, value in options.items() if name in known}
        logits = model(row[None], **options).logits[0]  # (T + 1 or P + T, V)
        # the logits at one token are about the next: the last ones are about nobody
        logits = logits[-len(response) - 1 : -1]  # (T, V)
        out.append(token_logprobs(logits, row[len(prompt_ids) :], temperature))
    return out


def token_logprobs(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """log softmax(logits / temperature) at the targets: (..., V) and (...) -> (...), float32 or better."""
    # A bfloat16 number has 8 significant bits, so a log-prob near −16 is rounded by up to 0.06: logits are widened
    # first. The temperature divides here as in sampling; left out here, the gradient would be another policy's.
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    negative = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none")
    return -negative.view_as(targets)


def check_scorable(groups: Sequence[Group], temperature: float) -> None:
    """ValueError, in a sentence, for what has no log-probs. (An empty response adds nothing to a loss, unnoticed.)"""
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

    This is the definition: `generate` on rows of equal length. Nothing is padded: a layer that keeps a state instead of
    its keys (Mamba, linear attention, a convolution) would read padding like any other token. `options` are
    generate's own (max_new_tokens, do_sample, temperature, top_p, top_k). `shared_sample`, below, draws the same and
    computes once what rows have in common.
    """
    places: dict[int, list[int]] = {}  # length -> rows of that length
    for i, row in enumerate(rows):
        places.setdefault(len(row), []).append(i)
    out: dict[int, Tensor] = {}
    with blank_generation(model, eos, pad):
        # One call per length. `generate` gets the ids as they are, and a mask of ones.
        for length, same in places.items():
            ids = torch.tensor([rows[i] for i in same], device=model.device)  # (rows, P)
            drawn = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
            # Behind the first end of sequence stands what `generate` fills rows up with. Nobody drew it.
            for i, row in zip(same, drawn_ids(drawn)[:, length:]):
                out[i] = until_end(row, eos)
    return [out[i] for i in range(len(rows))]


def drawn_ids(drawn) -> Tensor:
    """The ids in what `generate` returns, on the CPU: (rows, P + T)."""
    return getattr(drawn, "sequences", drawn).cpu()


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
# The model on this machine
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Sample:
    """One sampled response. `ids` are the very ids that were sampled, first EOS included, without padding.

    They are learned from, never `text`: encoded again, it may become other tokens, whose log-probs nobody sampled by.
    """

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
    lenient: int = 0  # ... in which it stood where it was not asked for, without tags, say; counted there too
    tokens_read: int = 0
    tokens_written: int = 0


class LocalModel:
    """A causal language model and its tokenizer. `sample` never changes the weights or the train/eval mode."""

    def __init__(self, model, tokenizer, max_batch_tokens: int = 0) -> None:
        """`max_batch_tokens` bounds rows x (longest prompt + max_new_tokens); 0: as many rows as the memory holds."""
        if getattr(tokenizer, "chat_template", None) is None:
            raise ValueError(
                "The tokenizer has no chat template: set its chat_template or use an instruct model."
            )
        self.model = model
        self.tokenizer = tokenizer
        self.max_batch_tokens = max_batch_tokens
        # Whether rows may share their prompts, below: it decides nothing but the speed. `verify` may take it back.
        self.share = can_share(model)
        self.own_attention = model.config._attn_implementation
        self.source = model.name_or_path  # the checkpoint it was loaded from; "": made in memory
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
            # A row that comes again is another draw. Greedy ones would be the same, so below each prompt comes once.
            rows = sorted(prompts * n)
            options |= {"temperature": temperature, "top_p": top_p, "top_k": top_k}
        else:
            rows = sorted(set(prompts))
        # By prompt, since `rows` are in another order than `chats`: a response must not end up with the prompt of its
        # neighbour.
        drawn: dict[tuple[int, ...], list[Tensor]] = {prompt: [] for prompt in prompts}
        if not self.share:
            rows.sort(key=len)  # rows of equal length are computed together
        for row, ids in zip(rows, self.draw(rows, options)):
            drawn[row].append(ids)
        out = []
        for prompt in prompts:
            if temperature > 0:
                responses = [drawn[prompt].pop() for _ in range(n)]  # equal chats share what was drawn
            else:
                responses = [drawn[prompt][0]] * n  # greedy: the same n times
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
        # The estimate of what fits comes first; the halving is for where it was too hopeful.
        pending = batches(self.model, rows, options["max_new_tokens"], self.share, self.max_batch_tokens)
        out: list[Tensor] = []
        while pending:
            batch = pending.pop(0)
            samples: list[Tensor] = []
            try:
                samples = self.draw_rows(batch, options)
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

    def draw_rows(self, rows: Sequence[Sequence[int]], options: dict) -> list[Tensor]:
        """One batch, the shared way; the plain way where the model turns out to be unable to share."""
        if self.share:
            try:
                return shared_sample(self.model, rows, self.eos, self.pad, **options)
            except NotImplementedError as error:
                self.stop_sharing()
                warnings.warn(f"{error} So each row is computed by itself, which is slower.", stacklevel=2)
        return plain_sample(self.model, rows, self.eos, self.pad, **options)

    def group_logprobs(
        self, groups: Sequence[Group], temperature: float = 1.0
    ) -> list[list[Tensor]]:
        """What is learned from: per group (prompt_ids, responses) a list of (T,) log-probs, differentiable."""
        if self.share:
            return group_logprobs(self.model, groups, temperature)
        out = []
        for prompt, responses in groups:
            out.append(plain_logprobs(self.model, prompt, responses, temperature))
        return out

    def stop_sharing(self) -> None:
        """From now on each row is computed by itself, with the attention that the model was loaded with."""
        self.share = False
        self.model.set_attn_implementation(self.own_attention)

    def encode(self, chat: Chat) -> list[int]:
        """Token ids of a chat up to where the answer begins. Control strings in its contents stay text."""
        contents = "".join(message["content"] for message in chat)
        forged = sorted(set(self.controls.findall(contents)))
        if forged:
            return encode_forged(self, chat, forged)
        # The template has written the beginning of sequence already, where there is one: a second would be another
        # prompt.
        return self.tokenizer(self.render(chat), add_special_tokens=False)["input_ids"]

    def render(self, chat: Chat) -> str:
        """The chat as text, template applied once; a system message joins the first user's where none is allowed."""
        try:
            # `enable_thinking=False` is for hybrid models such as Qwen3; templates that do not know the word ignore it.
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


# ---------------------------------------------------------------------------------------------------------------------
# From here on only efficiency and plumbing. Sampling: what rows have in common is computed once
# ---------------------------------------------------------------------------------------------------------------------

# Rows of a batch begin alike: all of them with the same schema and instructions, the rows of one prompt also with the
# same question. So the keys and values of a layer lie at three levels, each computed once and held once:
#     common  (h, P0, d)        what all R rows begin with; h heads of keys, each for a group of query heads
#     prompt  (h x D, P1, d)    what D prompts go on with, each for n rows
#     own     (h x R, T, d)     what a row has sampled; R = D x n rows, grouped by prompt
# Heads come first, so that the queries of one step lie in the order of every level.

Level = tuple[Tensor, Tensor]  # keys and values, (h x groups, length, d) each: the rows of a group share them

# Tokens read in one forward pass, those in common counted for every prompt. A CPU gains nothing by more.
READ_AT_ONCE = {"cpu": 4096, "cuda": 65536}
# What an attention function may be given and need not heed. Masks are the layers' business.
HARMLESS = {"dropout", "is_causal", "position_ids", "use_cache", "return_dict", "cache_position"}
HARMLESS |= {"output_attentions", "output_hidden_states", "output_router_logits"}


@torch.no_grad()
def shared_sample(
    model, rows: Sequence[Sequence[int]], eos: list[int], pad: int, **options
) -> list[Tensor]:
    """What `plain_sample` draws, for rows that share prompts; equal rows must be neighbours.

    NotImplementedError if the model turns out to be one that cannot (see `can_share`).
    """
    # `generate` takes positions from the mask, so a prompt that is shorter than the longest has its gap before its last
    # token, and its positions still count only what it has.
    shape = arrange(rows)
    last = torch.tensor([shape.prompts[i][-1:] for i in shape.owner])  # (D, 1)
    mask = torch.ones(len(last), shape.prefix + shape.longest + 1, dtype=torch.long)  # (D, P0 + P1 + 1)
    for row, i in zip(mask, shape.owner):
        row[shape.prefix + len(shape.rests[i]) : -1] = 0  # padding, before the prompt's last token
    with blank_generation(model, eos, pad), attention(model, "levels"):
        cache = prefill(model, shape, mask, pad, options["max_new_tokens"])
        # Only the last token of each prompt is new to the cache. The mask tells `generate` the positions.
        out = model.generate(
            last.repeat_interleave(shape.n, 0).to(model.device),  # (R, 1)
            attention_mask=mask.repeat_interleave(shape.n, 0).to(model.device),
            past_key_values=cache,
            **cheap_filters(options),
        )  # (R, 1 + T)
        check_attended(model, cache)
    # Without the first column: the last token of the prompt, which `generate` was started from.
    return [until_end(row, eos) for row in drawn_ids(out)[:, 1:]]


@dataclass
class Shape:
    """What the rows of a batch have in common."""

    prompts: list[list[int]]  # each once
    rests: list[list[int]]  # of each prompt: what follows the prefix, but for its last token
    prefix: int  # P0, tokens that all prompts begin with
    longest: int  # P1, of the rests
    owner: list[int]  # (D,) for every n rows the place of their prompt
    n: int


def arrange(rows: Sequence[Sequence[int]]) -> Shape:
    """Each prompt has n rows, or where a batch has cut some off, a multiple of it: then it counts as several.

    >>> shape = arrange([[5, 6, 1], [5, 6, 1], [5, 7, 8, 1], [5, 7, 8, 1]])
    >>> shape.prefix, shape.rests, shape.owner, shape.n
    (1, [[6], [7, 8]], [0, 1], 2)
    """
    prompts = []
    counts = []
    for prompt, same in groupby(rows):
        prompts.append([int(token) for token in prompt])
        counts.append(len(list(same)))
    n = math.gcd(*counts)
    owner = []
    for i, count in enumerate(counts):
        owner += [i] * (count // n)
    # The last token is left to `generate`, which must start from one.
    prefix = len(os.path.commonprefix([prompt[:-1] for prompt in prompts]))
    rests = [prompt[prefix:-1] for prompt in prompts]
    return Shape(prompts, rests, prefix, max(len(rest) for rest in rests), owner, n)


def prefill(model, shape: Shape, mask: Tensor, pad: int, new: int) -> Cache:
    """The two upper levels, computed. mask (D, P0 + P1 + 1): 0 where a prompt is padding."""
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    # First level: what all prompts begin with, read once.
    common: list[Level | None] = [None] * layers
    if shape.prefix:
        levels = read_texts(model, [shape.prompts[0][: shape.prefix]], common, pad)
        common = [(keys[:, 0], values[:, 0]) for keys, values in levels]  # (h, P0, d) each
    # Second level: what each prompt goes on with, read behind the first. A prompt whose rows a batch has cut counts as
    # several (see `arrange`), and is copied for each.
    prompt: list[Level | None] = [None] * layers
    if shape.longest:
        for i, (keys, values) in enumerate(read_texts(model, shape.rests, common, pad)):
            if len(shape.owner) > len(shape.prompts):
                keys = keys[:, shape.owner]
                values = values[:, shape.owner]
            prompt[i] = (keys.flatten(0, 1), values.flatten(0, 1))  # (h x D, P1, d) each
    length = shape.prefix + shape.longest
    hidden = None
    if not mask.all():
        hidden = (mask[:, None, shape.prefix : -1] == 0).to(model.device)  # (D, 1, P1)
    return Cache(layers=[RowLayer(*above, hidden, length, new) for above in zip(common, prompt)])


def read_texts(
    model, texts: Sequence[Sequence[int]], common: Sequence[Level | None], pad: int
) -> list[Level]:
    """Of each layer the keys and values of some texts behind a common beginning, (h, texts, P1, d).

    Texts of about one length are read together, padded on the right, and long ones alone. Beyond a text's end stands
    what nobody may look at, but it is finite.
    """
    # As many texts at once as READ_AT_ONCE tokens allow, what they have in common counted for each; at least one.
    longest = max(len(text) for text in texts)
    behind = 0 if common[0] is None else common[0][0].shape[1]
    most = READ_AT_ONCE["cpu" if model.device.type == "cpu" else "cuda"]
    waiting = [i for i, text in enumerate(texts) if len(text)]
    waiting.sort(key=lambda i: len(texts[i]))
    levels: list[Level] = []
    while waiting:
        # The longest that are left. Padding does no harm there: causal attention never looks to the right.
        width = len(texts[waiting[-1]])
        few = max(1, most // (behind + width))
        waiting, some = waiting[:-few], waiting[-few:]
        ids = right_pad([torch.tensor(texts[i]) for i in some], pad)
        cache = Cache(layers=[PromptLayer(above) for above in common])
        model(ids.to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
        check_attended(model, cache)
        for i, layer in enumerate(cache.layers):
            keys, values = layer.read  # type: ignore[union-attr]  # (some, h, width, d) each
            if len(levels) == i:
                all_keys = keys.new_zeros(keys.shape[1], len(texts), longest, keys.shape[3])
                all_values = values.new_zeros(*all_keys.shape[:3], values.shape[3])
                levels.append((all_keys, all_values))
            levels[i][0][:, some, :width] = keys.transpose(0, 1)
            levels[i][1][:, some, :width] = values.transpose(0, 1)
    return levels


class PromptLayer(DynamicLayer):
    """The cache of one layer while some prompts are read behind what they have in common.

    Causal attention never looks at padding on the right. So there is no mask, and long prompts need little memory.
    """

    def __init__(self, common: Level | None) -> None:
        super().__init__()
        self.common = common  # (h, P0, d) each
        self.ignored = True  # until its keys are attended to

    def get_seq_length(self) -> int:
        return 0 if self.common is None else self.common[0].shape[1]

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> Level:
        self.read = (key_states, value_states)  # (B, h, P1, d) each
        # Views: were they `read` itself, layer and keys would hold each other in memory.
        return handed_out(self, key_states[:], value_states[:])

    def attend(self, query: Tensor, scale: float) -> Tensor:
        """(B, heads, P1, d) -> (B, heads, P1, d)"""
        keys, values = self.read
        mask = None
        if self.common is not None:
            # Each prompt gets the common keys beside its own, for this one layer and moment.
            above = [x.expand(len(query), -1, -1, -1) for x in self.common]
            keys = torch.cat([above[0], keys], 2)  # (B, h, P0 + P1, d)
            values = torch.cat([above[1], values], 2)
            mask = causal_lower_right(query.shape[2], keys.shape[2])  # to torch a word, not a matrix
        return F.scaled_dot_product_attention(
            query,
            keys,
            values,
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=query.shape[1] != keys.shape[1],
        )


class RowLayer(DynamicLayer):
    """The cache of one layer while all rows are sampled, one token each per step."""

    def __init__(
        self,
        common: Level | None,
        prompt: Level | None,
        hidden: Tensor | None,
        length: int,
        new: int,
    ) -> None:
        """hidden (D, 1, P1): True where a prompt is padding, None if none is. length: P0 + P1. new: tokens that a row
        may get.
        """
        super().__init__()
        self.above = [level for level in (common, prompt) if level is not None]
        self.hidden = hidden
        self.length = length
        self.new = new
        self.used = 0  # T, tokens that a row has by now
        self.ignored = False

    def get_seq_length(self) -> int:
        return self.length + self.used

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> Level:
        """One more token: keys and values (R, h, 1, d)."""
        self.rows, heads = key_states.shape[:2]
        if self.used == 0:
            self.keys = key_states.new_empty(heads * self.rows, 0, key_states.shape[3])  # (h x R, room, d)
            self.values = value_states.new_empty(heads * self.rows, 0, value_states.shape[3])
        room = self.keys.shape[1]
        if self.used == room:
            # For as much again: copied log2(T) times, and never much more than what is used.
            more = min(max(32, room), max(1, self.new - room))
            self.keys = F.pad(self.keys, (0, 0, 0, more))
            self.values = F.pad(self.values, (0, 0, 0, more))
            # Views in the order in which tokens come, (room, R, h, d).
            self.key_slots = self.keys.unflatten(0, (heads, self.rows)).permute(2, 1, 0, 3)
            self.value_slots = self.values.unflatten(0, (heads, self.rows)).permute(2, 1, 0, 3)
        self.key_slots[self.used] = key_states.squeeze(2)
        self.value_slots[self.used] = value_states.squeeze(2)
        self.used += 1
        self.ignored = True
        return handed_out(self, key_states, value_states)

    def attend(self, query: Tensor, scale: float) -> Tensor:
        """(R, heads, 1, d) -> (R, heads, 1, d), one softmax over the three levels."""
        # Queries in the order of the levels, heads first: the queries that share a level's keys lie side by side.
        heads, size = query.shape[1], query.shape[3]
        group = heads * self.rows // len(self.keys)  # query heads of one key head
        query = (query * scale).view(self.rows, -1, group, size)
        query = query.transpose(0, 1).reshape(-1, size)  # (h x R x group, d)
        # The scores of each level: one product per level, in which no key is repeated for a row.
        levels = [*self.above, (self.keys[:, : self.used], self.values[:, : self.used])]
        scores = []
        for keys, _ in levels:
            score = torch.bmm(query.view(len(keys), -1, size), keys.mT)
            scores.append(score.view(len(query), -1))  # (h x R x group, length)
        # Padding in the prompts' level gets no weight: −inf before the softmax is 0 behind it.
        if self.hidden is not None:
            prompts, _, length = self.hidden.shape
            by_prompt = scores[-2].view(-1, prompts, self.rows // prompts * group, length)
            by_prompt.masked_fill_(self.hidden, -torch.inf)  # (h, D, n x group, P1)
        # One softmax over all three levels, as if the keys stood in one row: only then the weights are those of plain
        # attention.
        weights = torch.cat(scores, 1).softmax(1)  # (h x R x group, P0 + P1 + T)
        # The weighted values, summed over the levels.
        lengths = [score.shape[1] for score in scores]
        out = None
        for (_, values), weight in zip(levels, weights.split(lengths, 1)):
            weight = weight.view(len(values), -1, values.shape[1])
            if out is None:
                out = torch.bmm(weight, values)
            else:
                out = torch.baddbmm(out.view(len(values), -1, values.shape[2]), weight, values)
        # Back to rows first, as the model expects it.
        out = out.view(-1, self.rows, group, values.shape[2]).transpose(0, 1)
        return out.reshape(self.rows, heads, 1, -1)


def handed_out(layer: DynamicLayer, keys: Tensor, values: Tensor) -> Level:
    """Marked, so that the attention function finds the layer, and sees that they are as they came from it."""
    for tensor in (keys, values):
        tensor.layer = layer  # type: ignore[attr-defined]
    return keys, values


def levels_attention(
    module, query: Tensor, key: Tensor, value: Tensor, attention_mask, scaling=None, **kwargs
):
    """Attention, done by the layer of the cache that has handed out the keys.

    Whatever would change the result and is not known here (sinks, a softcap, a window, a bias) is an error.
    """
    strange = strange_settings(kwargs)
    layer = getattr(key, "layer", None)
    if layer is None or getattr(value, "layer", None) is not layer:
        strange.append("keys or values made anew")
    if attention_mask is not None:
        strange.append("a mask of its own")
    if strange:
        what = ", ".join(strange)
        raise NotImplementedError(f"Attention with {what} cannot share prompts.")
    layer.ignored = False
    out = layer.attend(query, scaling or query.shape[3] ** -0.5)  # (B, heads, Q, d)
    return out.transpose(1, 2), None  # (B, Q, heads, d)


def strange_settings(settings: dict[str, Any], known: Sequence[str] = ()) -> list[str]:
    """The names of those that may change what attention gives, in a way that is not known here."""
    strange = []
    for name, value in settings.items():
        if value is not None and name not in HARMLESS and name not in known:
            strange.append(name)
    return strange


AttentionInterface.register("levels", levels_attention)  # and no mask function: no mask is built


@contextmanager
def attention(model, name: str) -> Iterator[None]:
    """Inside, the model attends by this function; afterwards as before."""
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def check_attended(model, cache: Cache) -> None:
    """An attention that ignores the function asked for has seen a part of the keys only, without a word."""
    for layer in cache.layers:
        if layer.ignored:  # type: ignore[union-attr]
            name = type(model).__name__
            raise NotImplementedError(f"{name} attends in a way of its own and cannot share prompts.")


def can_share(model) -> bool:
    """Whether rows can share their prompts, as far as the model's class and config tell.

    They cannot where a layer keeps a window or a state instead of all keys, or adds something of its own to the
    attention. What is overlooked here raises NotImplementedError later.
    """
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder or not model._supports_attention_backend:
        return False
    for setting in ("attn_logit_softcapping", "alibi", "num_kv_shared_layers"):
        if getattr(config, setting, None):
            return False
    if any(name.endswith("sinks") for name, _ in model.named_parameters()):
        return False
    layers = DynamicCache(config=model.config).layers
    return all(type(layer) is DynamicLayer for layer in layers)


class TopKTopP(LogitsProcessor):
    """Temperature, then top-k, then top-p on what is left: the tokens that Hugging Face's three filters keep.

    Theirs sorts the whole vocabulary at every step, 152k numbers per row, although all but k have been ruled out.
    """

    def __init__(self, temperature: float, top_k: int, top_p: float) -> None:
        self.temperature = temperature
        self.top_k = top_k
        self.top_p = TopPLogitsWarper(top_p)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores / self.temperature  # (R, V)
        best = scores.topk(min(self.top_k, scores.shape[1]))
        least = best.values[:, -1:]
        places = best.indices  # (R, k)
        width = int((scores >= least).sum(1).max())
        if width > places.shape[1]:  # tokens that tie with the least of the k are kept as well
            places = scores.topk(width).indices
        left = scores.gather(1, places)  # (R, width)
        left = self.top_p(input_ids, left.masked_fill(left < least, -torch.inf))
        return torch.full_like(scores, -torch.inf).scatter(1, places, left)


def cheap_filters(options: dict[str, Any]) -> dict[str, Any]:
    """Options for `generate`, with TopKTopP for its own filters where these would sort without need."""
    if not options["do_sample"] or options["top_k"] == 0 or options["top_p"] == 1.0:
        return options
    filters = TopKTopP(options["temperature"], options["top_k"], options["top_p"])
    neutral = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    return {**options, **neutral, "logits_processor": [filters]}


# ---------------------------------------------------------------------------------------------------------------------
# Sampling: how many rows at once
# ---------------------------------------------------------------------------------------------------------------------

# Tokens that may be computed for each prompt anew, to make one batch of two: on a GPU a batch less saves a quarter of a
# minute, in which 500,000 tokens are read.
MOST_READ_TWICE = {"cpu": 32768, "cuda": 500_000}
ROOM_ON_CPU = 2 * 10**9  # bytes: modest on any machine


@dataclass
class Crowd:
    """A batch in figures."""

    first: Sequence[int]  # its first prompt
    prefix: int  # P0
    longest: int  # tokens of its longest prompt
    prompts: int
    rows: int

    def joined_by(self, prompt: Sequence[int], rows: int) -> Crowd:
        """The batch with some rows of another prompt."""
        both: list[Any] = [self.first[: self.prefix], prompt[:-1]]
        prefix = len(os.path.commonprefix(both))
        longest = max(self.longest, len(prompt))
        return Crowd(self.first, prefix, longest, self.prompts + 1, self.rows + rows)


def batches(
    model, rows: Sequence[Sequence[int]], new: int, share: bool, max_batch_tokens: int = 0
) -> list[list[Sequence[int]]]:
    """Sorted rows, in their order, in batches as large as fit; a prompt's rows together, if they fit at all.

    A batch also ends where another prompt would cost too much: behind 50 prompts with the same schema, one with another
    schema makes the schema each prompt's own. `max_batch_tokens` bounds rows x (longest prompt + new) in place of the
    memory.
    """
    # Memory is asked for once: what the batches before take is given back before the next one runs.
    room = bytes_free(model)
    most_read_twice = MOST_READ_TWICE["cpu" if model.device.type == "cpu" else "cuda"]

    def fits(crowd: Crowd) -> bool:
        if max_batch_tokens:
            return crowd.rows * (crowd.longest + new) <= max_batch_tokens
        return bytes_needed(model, crowd, new, share) <= room

    out: list[list[Sequence[int]]] = []
    crowd = Crowd((), 0, 0, 0, 0)
    for prompt, same in groupby(rows):
        waiting = list(same)
        # May this prompt join the batch before? Only if it fits, and does not make that batch read much twice.
        larger = crowd.joined_by(prompt, len(waiting))
        read_twice = (crowd.prefix - larger.prefix) * (crowd.prompts - 1)
        if not share:
            read_twice = 0  # nothing is common to lose
        if out and fits(larger) and read_twice <= most_read_twice:
            out[-1] += waiting
            crowd = larger
            continue
        # Else it begins a batch of its own, or several, if its rows do not fit into one.
        while waiting:
            crowd = Crowd(prompt, len(prompt) - 1, len(prompt), 1, len(waiting))
            while crowd.rows > 1 and not fits(crowd):
                crowd.rows = (crowd.rows + 1) // 2
            out.append(waiting[: crowd.rows])
            waiting = waiting[crowd.rows :]
    return out


def bytes_needed(model, crowd: Crowd, new: int, share: bool) -> int:
    """Memory for a batch whose rows get up to `new` tokens: keys and values, one layer's attention, the logits."""
    config = model.config.get_text_config(decoder=True)
    heads = figure(config, "num_attention_heads", 1)
    key_heads = figure(config, "num_key_value_heads", heads)
    size = figure(config, "head_dim", config.hidden_size // heads)
    item = model.dtype.itemsize
    seen = crowd.rows * (crowd.longest + new)  # tokens that all rows attend to
    held = seen
    if share:
        held = crowd.prefix + crowd.prompts * (crowd.longest - crowd.prefix) + crowd.rows * new
    cache = 2 * config.num_hidden_layers * key_heads * size * item * held
    attention = 3 * heads * item * seen  # scores, the same side by side, weights
    masks = 6 * 8 * seen  # ids, mask and positions are int64 and copied at every step
    logits = 6 * 4 * crowd.rows * config.vocab_size  # float32: as they come, filtered, as probabilities, ...
    return cache + attention + masks + logits


def figure(config, name: str, otherwise: int) -> int:
    """A figure of a config, or one like it where there is none (Mamba has no heads) or one per layer (Gemma 4)."""
    try:
        value = getattr(config, name)
    except Exception:  # of transformers' own
        return otherwise
    return value if isinstance(value, int) and value else otherwise


def bytes_free(model) -> int:
    """What a batch may take: four fifths of what the card has left, with what torch keeps in reserve."""
    if model.device.type != "cuda":
        return ROOM_ON_CPU
    free, _ = torch.cuda.mem_get_info(model.device)
    kept = torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
    return (free + kept) * 4 // 5


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
    # 1. Prompt and responses of a group as one row, and a mask that keeps the responses from seeing each other.
    packed = pack(groups)
    positions = packed.positions.to(model.device)
    window = attention_window(model)
    if window and positions.max() >= window:
        raise ValueError(
            f"The model attends to {window} tokens at a time; prompt and response must fit in there."
        )
    # 2. One forward pass. Logits only for tokens whose successors are scored: over the whole row, times a vocabulary of
    # 152k, they would be the largest tensor of all.
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
    # 3. Cut apart again. Padded places have log-probs as well, of a token 0 that nobody drew: they are left behind
    # here.
    logps = token_logprobs(logits, targets, temperature)  # (B, R)
    out = []
    for row, (_, responses) in zip(logps, groups):
        lengths = [len(response) for response in responses]
        out.append(list(row[: sum(lengths)].split(lengths)))
    return out


def attention_window(model) -> int:
    """How many tokens back its layers look at least; 0: to the beginning. A config may name a window and use none."""
    windows = []
    for layer in DynamicCache(config=model.config).layers:
        if getattr(layer, "sliding_window", 0):
            windows.append(layer.sliding_window)  # type: ignore[union-attr]
    return min(windows, default=0)


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
    # Per group the five rows, without padding. Positions go on from the prompt for each response anew.
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
    # All groups to one length. Who may see whom follows from owners and lengths, not from the ids: a padded place is
    # filled with 0, which is a token like any other.
    prompt_ids = right_pad(prompts)  # (B, P)
    owner = right_pad(owners, -1)  # (B, R)
    lengths = torch.tensor([len(prompt) for prompt in prompts])  # (B,)
    prompt_places = torch.arange(prompt_ids.shape[1])  # (P,)
    # −1 marks padding: it belongs to no response, so no response sees it.
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
    strange = strange_settings(kwargs, known=("scaling", "sliding_window"))  # a row fits into the window
    if strange:
        raise NotImplementedError(f"Attention with {', '.join(strange)} cannot share prompts.")
    p = query.shape[2] - attention_mask.shape[2]
    prompt, _ = sdpa(module, query[:, :, :p], key[:, :, :p], value[:, :, :p], None, **kwargs)
    responses, _ = sdpa(module, query[:, :, p:], key, value, attention_mask, **kwargs)
    return torch.cat([prompt, responses], 1), None  # (B, P + R, heads, d)


AttentionInterface.register("shared_prompt", shared_prompt_attention)
AttentionMaskInterface.register("shared_prompt", AttentionMaskInterface()["sdpa"])


# ---------------------------------------------------------------------------------------------------------------------
# Verified on a small batch: is what is learned from what was drawn?
# ---------------------------------------------------------------------------------------------------------------------

# The policy gradient is that of the policy that samples. There are four computations of its log-probs here, sampling
# and learning, each shared and plain, and models bring attentions, caches, masks and modes of their own to each. So
# before a model is used, some responses are drawn and scored, on the run's own prompts.

# How far two computations of one log-prob may be apart by rounding alone: nats, mean over the tokens behind a prompt.
# Measured on the random models of tests/test_architectures.py. Where nothing is wrong: at most 2e-6 in float32, but for
# a few of a hundred (Mamba2 computes in two ways: 2e-3); in bfloat16, whose numbers near 16 are 0.125 apart, 0.04, and
# with mixtures of experts, where rounding may choose another expert, 0.08. Where something is wrong (attention sinks, a
# softcap, a bias or a window left out, padding that is read, a model that looks ahead): 0.1 to 7.
TOLERANCE = {torch.float32: 0.01, torch.float16: 0.02, torch.bfloat16: 0.1}


@dataclass
class Check:
    """What `verify` found."""

    way: str  # how this model samples and learns: "shared" (prompts) or "plain" (row by row)
    error: float  # nats per token between what is drawn and what is learned, at the worst prompt
    tolerance: float
    dropped: str = ""  # why the shared way is not used, though it seemed to fit

    def __str__(self) -> str:
        text = f"sampled and computed log-probs differ by {self.error:.1e} nats per token"
        text += f" (rounding: up to {self.tolerance}); prompts are computed "
        text += "once for all their responses" if self.way == "shared" else "for each response anew"
        if self.dropped:
            text += f", since the shared way is wrong for this model ({self.dropped})"
        return text


class Recorder(StoppingCriteria):
    """Notes the distributions that `generate` draws from, after all its filters, and stops nothing."""

    def __init__(self) -> None:
        self.steps: tuple[Tensor, ...] = ()  # of each step the scores, (rows, V)

    def __call__(self, input_ids: Tensor, scores: tuple[Tensor, ...], **kwargs) -> Tensor:
        self.steps = scores
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def options(self) -> dict[str, Any]:
        """What makes `generate` tell."""
        return {"stopping_criteria": [self], "output_scores": True, "return_dict_in_generate": True}

    def logprobs(self, responses: Sequence[Tensor]) -> list[Tensor]:
        """log p of the tokens that were drawn, (T,) each."""
        every = torch.stack(self.steps, 1).float().log_softmax(-1).cpu()  # (rows, longest, V)
        out = []
        for row, response in zip(every, responses):
            out.append(row[: len(response)].gather(1, response[:, None])[:, 0])
        return out


def verify(
    local: LocalModel, chats: Sequence[Chat], n: int = 2, new: int = 32, checkpointing: bool = False
) -> Check:
    """Draw n responses of up to `new` tokens to each chat, and compare the log-probs they were drawn by with those that
    learning computes; where prompts are shared, with the plain ones as well.

    Beyond the tolerance the shared way is given up for good. ValueError, in a sentence, if the plain way disagrees too:
    what would be learned is another policy than the one that samples. `checkpointing`: learning runs in train mode.
    Moves no random draws outside, counts nothing, leaves the mode. Chats of different lengths show most.
    """
    model = local.model
    name = type(model).__name__
    prompts = sorted({tuple(local.encode(chat)) for chat in chats})
    tolerance = TOLERANCE.get(model.dtype, TOLERANCE[torch.bfloat16])
    # Some models change their weights as they compute (see `fingerprint`): then what is checked is not what will run.
    weights = fingerprint(model)
    compare = partial(disagreement, local, prompts, n, new, checkpointing)
    dropped = ""
    # 1. The shared way, if it seems to fit. Whatever goes wrong there costs speed only: the plain way remains.
    if local.share:
        try:
            error = compare()
            if not error <= tolerance:  # NaN, too
                dropped = f"{error:.2g} nats per token off"
        except torch.OutOfMemoryError:
            raise
        except Exception as trouble:  # whatever a model makes of an attention or a cache that is not its own
            dropped = one_line(trouble)
        if dropped:
            local.stop_sharing()
    # 2. The plain way, if it is the one that will be used. If that is wrong, the model cannot be used.
    if not local.share:
        try:
            error = compare()
        except torch.OutOfMemoryError:
            raise
        except Exception as trouble:
            raise ValueError(f"{name} cannot be used here: {one_line(trouble)}") from trouble
    if not torch.equal(weights, fingerprint(model)):
        raise ValueError(f"{name} cannot be used here: computing with it changes its weights.")
    if not error <= tolerance:
        raise ValueError(
            f"{name} cannot be used here: sampled and computed log-probs differ by {error:.2g} nats per "
            f"token, and rounding by {tolerance} at most. What it samples is not what it computes."
        )
    return Check("shared" if local.share else "plain", error, tolerance, dropped)


def disagreement(
    local: LocalModel, prompts: Sequence[tuple[int, ...]], n: int, new: int, checkpointing: bool
) -> float:
    """Nats per token between drawn, learned and plain log-probs of fresh responses, where it is most: at one prompt."""
    model = local.model
    options = {"max_new_tokens": new, "do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
    draw = shared_sample if local.share else plain_sample
    batches = [prompts] if local.share else [[prompt] for prompt in prompts]
    responses: list[Tensor] = []
    drawn: list[Tensor] = []
    # 1. Draw, and note by which log-probs. A seed of its own in a fork: the run's draws stay as they would have been.
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(0)
        for batch in batches:
            recorder = Recorder()
            rows = [prompt for prompt in batch for _ in range(n)]
            some = draw(model, rows, local.eos, local.pad, **options, **recorder.options())
            responses += some
            drawn += recorder.logprobs(some)
    # 2. Score the same responses as learning does, in the mode in which it does, and by the definition.
    groups = []
    for i, prompt in enumerate(prompts):
        groups.append((torch.tensor(prompt), responses[i * n : (i + 1) * n]))
    mode = model.training
    model.train(checkpointing)
    try:
        with torch.no_grad():
            learned = local.group_logprobs(groups)
            with attention(model, local.own_attention):
                plain = [plain_logprobs(model, *group) for group in groups]
    finally:
        model.train(mode)
    # 3. Compare. The mean over tokens, but the worst prompt: one wrong prompt of many must not be averaged away.
    errors = []
    for i in range(len(prompts)):
        here = torch.cat(learned[i]).cpu()
        errors.append((here - torch.cat(drawn[i * n : (i + 1) * n])).abs().mean())
        errors.append((here - torch.cat(plain[i]).cpu()).abs().mean())
    return float(torch.stack(errors).max())


def fingerprint(model) -> Tensor:
    """The sum of each parameter: some models (RWKV) rescale their weights when they switch between two modes."""
    sums = [parameter.detach().sum(dtype=torch.float64).cpu() for parameter in model.parameters()]
    return torch.stack(sums).nan_to_num()


def one_line(trouble: Exception) -> str:
    """What an exception says, or its name, short."""
    return " ".join((str(trouble) or type(trouble).__name__).split())[:200]


# ---------------------------------------------------------------------------------------------------------------------
# Learning: steps that bf16 would lose
# ---------------------------------------------------------------------------------------------------------------------


class MasterAdamW:
    """AdamW whose steps are not lost in bf16.

    At lr 1e-6 a step is smaller than half the gap between neighbouring bf16 numbers, and 98% of the weights would never
    move. So parameters in 16 bits get float32 masters, and the moments, on the CPU: the GPU holds 2 + 2 bytes per
    parameter, weight and gradient. Parameters in float32 are their own masters, and this is plain AdamW.

    A master is the same weight with 24 bits instead of 8: steps add up in it until they show in the parameter, its
    rounded copy. Nothing warns of lost steps: loss and gradient look as they should, and the model stays what it is.
    """

    def __init__(
        self, model, lr: float, max_norm: float = 1.0, weight_decay: float = 0.0, betas=(0.9, 0.999)
    ) -> None:
        """`max_norm` clips the norm of the whole gradient. The learning rate may be changed in `adamw.param_groups`.

        The model stays on its device, one GPU or the CPU. `host_bytes(model)` says what this takes there.
        """
        self.max_norm = max_norm
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.masters: list[Tensor] = []
        self.copied: list[tuple[Tensor, Tensor]] = []  # (parameter in 16 bits, its master)
        short = [p for p in self.params if p.dtype.itemsize < 4]
        self.stream = torch.cuda.Stream(short[0].device) if short and short[0].is_cuda else None
        largest = max((p.numel() for p in short), default=0)
        self.passages = [Passage(largest, self.stream), Passage(largest, self.stream)]
        for param in self.params:
            if param.dtype.itemsize < 4:
                self.passages[0].fetch(param.detach())
                master = self.passages[0].arrived().clone()
                self.copied.append((param, master))
            else:
                master = param
            self.masters.append(master)
        self.adamw = torch.optim.AdamW(
            self.masters, lr=lr, betas=betas, weight_decay=weight_decay, fused=True
        )

    @staticmethod
    def host_bytes(model) -> int:
        """The host memory that an optimizer of this model takes from its first step on: 12 bytes per weight in 16 bits,
        for master and moments, and two passages for the largest tensor. Weights in float32 on a CPU: 8 bytes each.
        """
        total = largest = 0
        for param in model.parameters():
            if param.requires_grad and param.dtype.itemsize < 4:
                total += 12 * param.numel()
                largest = max(largest, 4 * param.numel())
            elif param.requires_grad and not param.is_cuda:
                total += 8 * param.numel()
        if largest:
            largest = 2 ** math.ceil(math.log2(largest))  # torch rounds pinned memory up to a power of two
        return total + 2 * largest

    @torch.no_grad()
    def step(self) -> float:
        """Clip, step, clear the gradients; returns their norm before clipping. Not finite: the step was skipped."""
        # Of the whole gradient, in one number: clipped per tensor, its direction would change.
        norm = float(torch.nn.utils.clip_grad_norm_(self.params, self.max_norm))
        if math.isfinite(norm):
            self.adamw.step()  # steps what has a gradient: those that are their own masters
            for master in self.masters:
                master.grad = None
            self.step_masters()
        for param in self.params:
            param.grad = None
        return norm

    def step_masters(self) -> None:
        """One master after the other: its gradient comes, it steps, its parameter becomes equal to it.

        While the CPU makes one step, the next gradient is on its way from the GPU, and the last weights on theirs back.
        """
        moving = [(param, master) for param, master in self.copied if param.grad is not None]
        for i, (param, master) in enumerate(moving):
            # Two passages in turn: one holds the gradient that is used now, the other receives the next.
            passage = self.passages[i % 2]
            if i == 0:
                passage.fetch(param.grad)
            if i + 1 < len(moving):
                following = moving[i + 1][0]
                self.passages[(i + 1) % 2].fetch(following.grad)
            master.grad = passage.arrived()
            self.adamw.step()
            master.grad = None
            passage.send(master, param)
        if self.stream is not None:
            self.stream.synchronize()  # until the last weights are there

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


class Passage:
    """Host memory, in float32, that one tensor at a time passes through on its way from a GPU or back to it.

    It is pinned, so copies run beside the CPU's work, on a stream of their own, in the order in which they were begun:
    once a gradient has arrived, the weights sent before it have left. On a CPU (no stream) they are plain copies.
    """

    def __init__(self, numel: int, stream: torch.cuda.Stream | None) -> None:
        self.stream = stream
        self.room = torch.empty(numel, dtype=torch.float32, pin_memory=stream is not None)
        self.event = None if stream is None else torch.cuda.Event()

    def fetch(self, tensor: Tensor) -> None:
        """Begin to copy a tensor to here. A copy that does not block is converted by the GPU."""
        self.held = self.room[: tensor.numel()].view(tensor.shape)
        if self.stream is not None:  # the GPU's other work comes first: the tensor may be its result
            self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):  # None: as if it were not there
            self.held.copy_(tensor, non_blocking=True)
        if self.event is not None:
            self.event.record(self.stream)

    def arrived(self) -> Tensor:
        """What was fetched, as soon as it is there; of use until the next `fetch` or `send`."""
        if self.event is not None:
            self.event.synchronize()
        return self.held

    def send(self, master: Tensor, param: Tensor) -> None:
        """Begin to copy a master to its parameter."""
        self.held.copy_(master)
        with torch.cuda.stream(self.stream):
            param.copy_(self.held, non_blocking=True)


# ---------------------------------------------------------------------------------------------------------------------
# Plumbing: control strings in what a model or a data set wrote
# ---------------------------------------------------------------------------------------------------------------------


def encode_forged(local: LocalModel, chat: Chat, forged: list[str]) -> list[int]:
    """Token ids of a chat whose contents hold the control strings `forged`, which must stay text.

    A `<|im_start|>` within instructions could forge a role. So control strings in contents are swapped for stand-ins
    before the template runs, and swapped back once the template's own control strings are cut out.
    """
    contents = "".join(message["content"] for message in chat)
    # A stand-in is one private character that occurs in no content, so swapping back cannot hit anything else.
    private = (chr(code) for code in range(0xE000, 0xF900))  # characters that mean nothing by themselves
    stand_in = dict(zip(forged, (char for char in private if char not in contents)))
    masked = []
    for message in chat:
        content = local.controls.sub(lambda hit: stand_in[hit[0]], message["content"])
        masked.append(message | {"content": content})
    original = str.maketrans({mark: control for control, mark in stand_in.items()})
    forged_ids = local.tokenizer.convert_tokens_to_ids(forged)
    ids: list[int] = []
    pieces = local.controls.split(local.render(masked))  # text, control, text, ..., text
    for i, piece in enumerate(pieces):
        if i % 2:  # one that the template wrote
            ids.append(local.tokenizer.convert_tokens_to_ids(piece))
            continue
        text = piece.translate(original)
        plain = local.tokenizer(text, add_special_tokens=False, split_special_tokens=True)
        # A vocabulary of whole words cannot spell a control string in pieces: there it is dropped.
        ids += [token for token in plain["input_ids"] if token not in forged_ids]
    return ids


# ---------------------------------------------------------------------------------------------------------------------
# Plumbing: a model behind a server. No single answer ends a run
# ---------------------------------------------------------------------------------------------------------------------

# From the inside out: _send speaks HTTP and makes a Reply of whatever comes, _request finds the route, _chat leaves out
# the settings that the server turns down, _answer asks again where that may help, _sample reads the reply, _judge says
# whether the rest of the batch is worth asking for. Nothing raises below `sample`: what went wrong stands in the words.

# Finish reasons, in lower case. What stands in none of these sets (a content filter, say) is a failed answer. No
# tools are ever offered: a model that "calls" one has ended by itself, and its text is its answer.
COMPLETE = {"", "stop", "eos", "eos_token", "end_turn", "stop_sequence", "complete", "tool_calls"}
CUT = {"length", "max_tokens", "max_length", "model_length", "max_output_tokens"}
STUMBLED = {"error", "abort", "insufficient_system_resource"}  # the server's trouble: asking again may help

# A server that turns down a setting names it. The first one of these that it names is left out first.
OPTIONAL = ("top_k", "top_p", "temperature", "max_tokens")
# A prompt that does not fit is refused in words that name max_tokens, too: that is no word against the setting, and
# without it vLLM would answer in the room that is left, now and from then on.
TOO_LONG = re.compile("context.length|too (long|large|big|many|high)|at most|exceed|reduce|maximum", re.I)
# What no field of a URL may be called: URLs are printed and saved.
SECRET = re.compile("key|token|secret|passw|auth|sig|code|credential", re.I)

PATIENCE = 8  # after so many answers in a row that the server owes us: is it there at all?
HELLO = [{"role": "user", "content": "Hello"}]


@dataclass
class Reply:
    """What came back for one request."""

    status: int  # of HTTP; 0: nothing came; 408: too late; 200: an answer; 502: a 200 that holds none
    body: Any = None  # the JSON
    words: str = ""  # what is wrong, in the server's words; "" for an answer
    wait: float = 0.0  # seconds that the server asks for (Retry-After)

    @property
    def may_pass(self) -> bool:
        """The server's own trouble: worth another try."""
        return self.status in (0, 408, 409, 425, 429) or self.status >= 500

    @property
    def no_entry(self) -> bool:
        """Wrong key, route or model, most likely; but a firewall may refuse one prompt by a 403."""
        return self.status in (403, 404, 405) or 300 <= self.status < 400


@dataclass
class Batch:
    """What the requests of one call of `sample` know of each other."""

    owed: int = 0  # answers in a row that the server failed to give
    why: str = ""  # the words for which the batch was given up
    over: Event = field(default_factory=Event)  # from now on nobody asks or waits

    def give_up(self, words: str) -> None:
        """The first words count: what fails after them fails because of it."""
        self.why = self.why or words
        self.over.set()


class RemoteModel:
    """A model behind an OpenAI-compatible server (vLLM, llama.cpp, Ollama, OpenAI, Azure, ...), as a LocalModel.

    base_url: used as given, but for /chat/completions at its end; where it has no such route, /v1 is added. A query
    (Azure's ?api-version=...) goes along with every request; a key in a URL is refused.
    model: its name there; None takes the first that GET .../models lists.
    api_key: default $LSE_API_KEY, else $OPENAI_API_KEY; else "no-key", never this machine's Hugging Face token.
    key_name: another variable, looked into before those two. Sent as a Bearer token and as Azure's api-key, as OpenAI's
    own client for Azure does (other servers ignore the latter); to no other host (redirects are not followed); never
    printed.
    timeout: seconds without a byte; after such a silence there is one more try. concurrency: requests in flight.
    retries, backoff: what may pass (429, 5xx, a lost connection, a reply that is none) is tried again up to
    `retries` times, after about backoff * 2^attempt seconds or what Retry-After asks for, a minute at most.
    extra: more fields for every request; one that is None is not sent. (vLLM, for one, samples by the checkpoint's
    own top_k where none is sent: {"top_k": -1} switches that off.)

    No single answer ends a run: one that fails is a Sample with an `error`. `usage` counts answers, failed ones
    included, and tokens as the server reports them. `dropped` holds the settings that the server turned down, with
    its words; they are not sent any more. Proxies are used as the environment says, but not on this machine.
    """

    def __init__(self, base_url: str, model: str | None = None, api_key: str | None = None, *,
                 timeout: float = 600.0, concurrency: int = 16, retries: int = 5, backoff: float = 1.0,
                 extra: dict | None = None, key_name: str = "LSE_API_KEY") -> None:
        names = [name for name in (key_name, "LSE_API_KEY", "OPENAI_API_KEY") if os.environ.get(name)]
        self._key_name = names[0] if names else "LSE_API_KEY"
        key = api_key or os.environ.get(self._key_name) or "no-key"
        self._key = key.strip()
        if not re.fullmatch("[!-~]+", self._key):  # the HTTP library would refuse it, and quote it
            raise ValueError(f"the key must be one ASCII word in {self._key_name}")
        self.base_url, self._query = split_url(base_url)
        self._routes = [self.base_url]  # those that may be right; one, after the first answer
        if not self.base_url.endswith("/v1"):
            self._routes.append(f"{self.base_url}/v1")
        self.concurrency = concurrency
        self.retries = retries
        self.backoff = backoff
        self.extra = extra or {}
        self.usage = Usage()
        self.dropped: dict[str, str] = {}  # setting -> the server's words
        self._answered = False  # has this server ever?
        self._warned = False  # that it cuts prompts
        self._lock = Lock()
        self._client = self._connect(timeout)
        self.model = model or self._first_model()

    def sample(self, chats: Sequence[Chat], n: int = 1, max_new_tokens: int = 512, temperature: float = 1.0,
               top_p: float = 1.0, top_k: int = 0) -> list[list[Sample]]:
        """n samples for each chat, in order; temperature 0 is greedy. top_k = 0 is not sent: OpenAI has no top_k.

        Each sample is a request of its own, since not every server knows OpenAI's n. ConnectionError, with the
        server's words, where nothing works: a wrong key or model, a server that stopped answering, or a batch
        without any answer from a server that does not answer a plain "Hello" either.
        """
        body = {"model": self.model, "max_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p,
                "top_k": top_k or None, "stream": False, **self.extra}
        bodies = [{**body, "messages": chat} for chat in chats for _ in range(n)]
        batch = Batch()
        with ThreadPoolExecutor(self.concurrency) as pool:
            try:
                found = list(pool.map(partial(self._answer, batch), bodies))
            finally:
                batch.over.set()  # after Ctrl-C, too: nobody waits for another try
        if found and all(sample.error for sample in found):
            self._say_hello(batch, bodies[-1], found[-1].error)
        if batch.why:
            raise ConnectionError(self._failure("chat/completions", batch.why))
        return [found[i * n : (i + 1) * n] for i in range(len(chats))]

    # One answer: asked for, asked for again, judged, read

    def _answer(self, batch: Batch, body: dict) -> Sample:
        """One answer, asked for again while that may help. Whatever goes wrong stands in its `error`."""
        if batch.over.is_set():
            return Sample("", None, None, False, "not asked for")
        reply = self._persist(partial(self._chat, body), batch.over)
        sample = self._sample(reply)
        with self._lock:
            self.usage.answers += 1
            self.usage.failed += bool(sample.error)
            self.usage.cut += sample.truncated
        self._judge(batch, body, reply)
        return sample

    def _persist(self, ask: Callable[[], Reply], over: Event) -> Reply:
        """The reply, after up to `retries` more tries; after a timeout there is one more."""
        reply = ask()
        for attempt in range(self.retries):
            too_late = reply.status == 408 and attempt > 0
            if too_late or not reply.may_pass or over.wait(self._pause(attempt, reply)):
                break
            reply = ask()
        return reply

    def _pause(self, attempt: int, reply: Reply) -> float:
        """Seconds until another try. The jitter is of its own making: retries must not move a seeded run."""
        wait = self.backoff * 2**attempt * random.SystemRandom().uniform(0.5, 1.5)
        return min(max(wait, reply.wait), 60.0)

    def _judge(self, batch: Batch, body: dict, reply: Reply) -> None:
        """Give the batch up where the rest of it would fail in the same way, one by one, for hours.

        A refusal of one prompt (too long, filtered) says nothing of the next one. A key or a bill that is not
        accepted does; so does a wrong route or model, unless the server has answered before. An answer that the
        server owes us after all tries may be the prompt's fault: after several in a row, a plain "Hello" tells.
        """
        self._answered = self._answered or reply.status == 200
        if reply.status in (401, 402) or (reply.no_entry and not self._answered):
            batch.give_up(reply.words)
        with self._lock:
            owes = reply.may_pass or reply.no_entry
            batch.owed = batch.owed + 1 if owes else 0
            ask = owes and batch.owed % PATIENCE == 0
        if ask:
            self._say_hello(batch, body, reply.words)

    def _say_hello(self, batch: Batch, body: dict, words: str) -> None:
        """Give the batch up, for its `words`, if the server does not even answer "Hello"."""
        if batch.why:
            return
        reply = self._chat({**body, "messages": HELLO})
        if self._sample(reply).error:
            batch.give_up(words)

    def _sample(self, reply: Reply) -> Sample:
        """The sample in a reply: complete, cut (perhaps while still thinking: without text), or failed."""
        if reply.words:
            return Sample("", None, None, False, reply.words)
        # Three ends: cut off at the limit, complete, or anything else, which is a failed answer.
        choice = entry(entry(reply.body, "choices"), 0)
        message = entry(choice, "message")
        text = content_text(entry(message, "content"))
        reason = finish_reason(choice)
        if reason in CUT:
            return Sample(self._clean(text or ""), None, None, True)
        if reason in COMPLETE and text is not None:
            return Sample(self._clean(text), None, None, False)
        words = entry(message, "refusal") or f"no text to use (finish_reason: {reason or 'none'})"
        return Sample("", None, None, False, self._short(str(words)))

    # One request: settings, route, HTTP

    def _chat(self, body: dict) -> Reply:
        """One chat completion. A setting that a refusal names is left out, and for good if that was the reason.

        GPT-5 takes no temperature and calls max_tokens max_completion_tokens; Claude takes no top_p beside it.
        """
        # Ends, since each turn leaves out one more of four settings.
        left_out = dict(self.dropped)
        while True:
            sent = {}
            for name, value in body.items():
                if name == "max_tokens" and name in left_out:
                    sent["max_completion_tokens"] = value
                elif name not in left_out and value is not None:
                    sent[name] = value
            reply = self._request("chat/completions", sent)
            refused = refused_setting(reply, sent)
            if not refused:
                break
            left_out[refused] = reply.words
        if reply.status == 200:
            self._keep_out(left_out)
            self._count_tokens(reply, body)
        return reply

    def _keep_out(self, left_out: dict[str, str]) -> None:
        """From now on no request holds these settings. Each is warned of once, whichever thread found it out."""
        with self._lock:
            new = [name for name in left_out if name not in self.dropped]
            self.dropped.update(left_out)
        for name in new:
            words = left_out[name]
            warnings.warn(f"{self.model} turns down {name}, so it is left out ({words})", stacklevel=2)

    def _count_tokens(self, reply: Reply, body: dict) -> None:
        """Adds up what the server reports, and warns once where it has read far less than was sent.

        Ollama, for one, cuts a prompt at 4,096 tokens and answers 200. A prompt has at least one token per word
        between white space, and per 8 characters, for scripts without spaces: Chinese has less than 2 characters to
        a token, English 4 and more. Real counts are 1.3 to 4 times that, so a count below it is far below. Nobody
        cuts at less than 500.
        """
        usage = entry(reply.body, "usage")
        read = whole_number(entry(usage, "prompt_tokens"))
        words = " ".join(str(message["content"]) for message in body["messages"]).split()
        least = max(len(words), len("".join(words)) // 8)
        with self._lock:
            self.usage.tokens_read += read
            self.usage.tokens_written += whole_number(entry(usage, "completion_tokens"))
            warn = not self._warned and 0 < read < least and least > 500
            self._warned = self._warned or warn
        if warn:
            told = f"it says that it read {read:,} tokens of at least {least:,}"
            warnings.warn(f"{self.base_url} cuts long prompts: {told}. Give it a longer context "
                          "(Ollama: num_ctx).", stacklevel=2)

    def _request(self, path: str, sent: dict | None = None) -> Reply:
        """One request to the route that has answered before; until then, to the given URL, then to it and /v1."""
        replies: list[Reply] = []
        routes = self._routes
        for route in routes:
            reply = self._send(f"{route}/{path}{self._query}", sent)
            replies.append(reply)
            if reply.status == 200:
                self.base_url = route
                self._routes = [route]
            if reply.status not in (404, 405, 502):  # 502: LM Studio answers 200 where it has no route
                return reply
        told = max(replies, key=lambda reply: reply.status)  # a 502 may pass, a 404 does not
        if len(routes) > 1:
            both = [f"{route}/{path}: {reply.words}" for route, reply in zip(routes, replies)]
            told.words = "; ".join(both)
        return told

    def _send(self, url: str, sent: dict | None) -> Reply:
        """POST `sent`, or GET. Never raises: what there is to say of an error stands in the reply's words."""
        # Three things may go wrong, in this order: nothing comes, it is no JSON, or it is an error (perhaps with status
        # 200).
        try:
            if sent is None:
                response = self._client.get(url)
            else:  # in ASCII and \u escapes: no text can fail to be encoded
                response = self._client.post(url, content=json.dumps(sent).encode())
        except httpx.TimeoutException as error:
            return Reply(408, words=f"no answer: it timed out ({type(error).__name__})")
        except httpx.HTTPError as error:
            return Reply(0, words=self._short(f"no answer: {type(error).__name__} {error}"))
        try:
            body = json.loads(response.content)
        except (ValueError, RecursionError):
            body = None
        status = response.status_code
        if response.is_success:
            status = worth(body, "data" if sent is None else "choices")
        if status == 200:
            return Reply(200, body)
        said = error_words(body, response.content.decode("utf-8", "replace"))
        if response.has_redirect_location:
            said = f"moved to {response.headers['location']}: give that URL"
        wait = retry_after(response.headers.get("retry-after", ""))
        return Reply(status, body, self._short(f"{response.status_code}: {said}"), wait)

    # Plumbing

    def _connect(self, timeout: float) -> httpx.Client:
        """A client that keeps its connections, for all threads. Proxies are for other machines only."""
        here = urlsplit(self.base_url).hostname in ("localhost", "127.0.0.1", "::1")
        keys = {"Authorization": f"Bearer {self._key}", "api-key": self._key}
        try:
            return httpx.Client(headers={"Content-Type": "application/json", **keys}, trust_env=not here,
                                 timeout=httpx.Timeout(timeout, connect=min(timeout, 20.0)),
                                 limits=httpx.Limits(max_connections=self.concurrency))
        except ImportError as error:  # SOCKS takes one more package
            raise ValueError(f"the proxy in HTTP_PROXY or ALL_PROXY cannot be used: {error}") from None

    def _first_model(self) -> str:
        """The first model that the server lists. ConnectionError if it does not answer, or lists none."""
        reply = self._persist(partial(self._request, "models"), Event())
        name = entry(entry(entry(reply.body, "data"), 0), "id")
        if reply.words or not isinstance(name, str):
            raise ConnectionError(self._failure("models", reply.words or "no models are listed"))
        return name

    def _failure(self, path: str, words: str) -> str:
        """What a ConnectionError says: where, the server's words, what its user can do."""
        return (f"{self.base_url}/{path} failed. {words}\nWhat to do: see that the server is up, check URL, "
                f"model name, settings and quota, and the key in {self._key_name}")

    def _short(self, words: str) -> str:
        """A server's words, fit to be printed and saved: one line without the key."""
        words = words.encode("utf-8", "replace").decode().replace(self._key, "***")
        return " ".join(words.split())[:400]

    def _clean(self, text: str) -> str:
        """A reply's text, fit to be saved: no half of a UTF-16 pair, and no key, which a server may echo."""
        text = text.encode("utf-8", "replace").decode()
        if len(self._key) > 15:  # "EMPTY" and the like are no secrets
            text = text.replace(self._key, "***")
        return text


def split_url(url: str) -> tuple[str, str]:
    """The base URL, without / or /chat/completions at its end, and its query: "" or "?...".

    ValueError, which does not show the URL, if it is none or may hold a password or a key.

    >>> split_url("https://me.azure.com/openai/deployments/gpt/chat/completions?api-version=2024-10-21")
    ('https://me.azure.com/openai/deployments/gpt', '?api-version=2024-10-21')
    """
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(httpx.URL(url).host)
    except (ValueError, httpx.InvalidURL):
        usable = False
    secret = False
    if usable:
        fields = parse_qsl(parts.query, keep_blank_values=True)
        secret = any(SECRET.search(name) or not value for name, value in fields)  # "?sk-123" is a value alone
    if not usable or secret or re.search(r"[\s#@]", url):
        raise ValueError("the URL of a server looks like http://host:8000/v1; keys stand in LSE_API_KEY only")
    path = parts.path.rstrip("/").removesuffix("/chat/completions").rstrip("/")
    query = f"?{parts.query}" if parts.query else ""
    return f"{parts.scheme}://{parts.netloc}{path}", query


def entry(thing: Any, place: str | int) -> Any:
    """thing[place], or None where there is no such thing: servers send what they please.

    >>> entry(entry({"choices": [7]}, "choices"), 0), entry(None, "choices")
    (7, None)
    """
    if isinstance(thing, dict):
        return thing.get(place)
    if isinstance(thing, list) and isinstance(place, int) and place < len(thing):
        return thing[place]
    return None


def whole_number(value: Any) -> int:
    """The value if it is a count, else 0."""
    return value if isinstance(value, int) and value > 0 else 0


def content_text(content: Any) -> str | None:
    """A message's text: a string, or the text among its parts, without a reasoning model's thinking. None: none.

    >>> content_text([{"type": "thinking", "thinking": "2 + 2 ..."}, {"type": "text", "text": "4"}])
    '4'
    """
    if isinstance(content, str):
        return content
    texts = []
    for part in content if isinstance(content, list) else []:
        if isinstance(part, str):
            texts.append(part)
        elif entry(part, "type") in ("text", "output_text") and isinstance(entry(part, "text"), str):
            texts.append(part["text"])
    return "".join(texts) if texts else None


def finish_reason(choice: Any) -> str:
    """In lower case, since Google shouts; "" for none."""
    return str(entry(choice, "finish_reason") or "").lower()


def worth(body: Any, wanted: str) -> int:
    """The status that a 200 deserves: 200 if it holds what is wanted, else the code of its error, else 502.

    >>> worth({"choices": [{"message": {"content": "4"}}]}, "choices"), worth({"error": {"code": 429}}, "choices")
    (200, 429)
    >>> worth({"choices": []}, "choices"), worth("lunch break", "data")
    (502, 502)
    """
    first = entry(entry(body, wanted), 0)
    error = entry(body, "error") or entry(first, "error")
    code = entry(error, "code")
    if error:
        return code if isinstance(code, int) and 400 <= code < 600 else 502
    if wanted == "data":
        return 200 if isinstance(entry(body, "data"), list) else 502
    usable = isinstance(entry(first, "message"), dict) and finish_reason(first) not in STUMBLED
    return 200 if usable else 502


def error_words(body: Any, text: str) -> str:
    """What an error says: OpenAI's {"error": {"message": ...}} or a relative of it; else the page without tags.

    >>> error_words({"error": {"message": "not with this model", "param": "temperature"}}, "")
    "not with this model ('temperature')"
    """
    if isinstance(body, list) and body:  # Gemini
        body = body[0]
    if not isinstance(body, dict):
        return re.sub("<[^>]*>", " ", str(body or text)).strip() or "an empty reply"
    choice = entry(body.get("choices"), 0)
    error = body.get("error") or entry(choice, "error") or body.get("detail") or body
    words = str(entry(error, "message") or error)
    # The setting that is meant; and what stands behind OpenRouter's "Provider returned error".
    for name in ("param", "metadata"):
        more = entry(error, name)
        if more and str(more) not in words:
            words = f"{words} ({more!r})"
    return words


def refused_setting(reply: Reply, sent: dict) -> str:
    """The setting that a refusal is about, or "".

    >>> refused_setting(Reply(400, words="Unsupported value: 'temperature'"), {"temperature": 0.7, "top_p": 1.0})
    'temperature'
    >>> refused_setting(Reply(400, words="max_tokens is too large: 512. The maximum is 196"), {"max_tokens": 512})
    ''
    """
    if reply.status in (400, 422) and not TOO_LONG.search(reply.words):
        for name in OPTIONAL:
            if name in sent and re.search(rf"\b{name}\b", reply.words):
                return name
    return ""


def retry_after(header: str) -> float:
    """The seconds that a Retry-After header asks for, in decimals or by a date; 0 if it says nothing of use.

    >>> retry_after("1.5"), retry_after("soon"), retry_after("Wed, 21 Oct 2015 07:28:00 GMT")
    (1.5, 0.0, 0.0)
    """
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?", header):
        return float(header)
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0
