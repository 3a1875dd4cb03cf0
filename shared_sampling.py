"""Scratch: the section "From here on only efficiency: sampling" of lse.py, until the new lse.py lands."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from transformers import (
    AttentionInterface, Cache, DynamicCache, DynamicLayer, GenerationConfig, LogitsProcessor, TopPLogitsWarper)


@contextmanager
def ready_to_sample(model, eos: Sequence[int], pad: int) -> Iterator[None]:
    """No dropout, and none of the checkpoint's own settings; afterwards all is as it was, also after an error."""
    training = model.training
    config = model.generation_config
    attention = model.config._attn_implementation
    try:
        model.eval()  # no gradient checkpointing either: that would silently drop the cache
        # A checkpoint's own top_k, penalties or length limits must not leak into the sampling: start from a blank
        # one. A NaN among the logits must not end the process (on a GPU it would).
        model.generation_config = GenerationConfig(
            eos_token_id=list(eos) or None, pad_token_id=pad, repetition_penalty=1.0, remove_invalid_values=True)
        yield
    finally:
        model.generation_config = config
        if model.config._attn_implementation != attention:
            model.set_attn_implementation(attention)
        model.train(training)


def until_eos(out: Tensor, eos: Sequence[int]) -> list[Tensor]:
    """Sampled ids (R, T) -> each row up to its first EOS, which stays."""
    out = out.cpu()
    is_eos = torch.isin(out, torch.tensor(list(eos), dtype=out.dtype))  # (R, T)
    eos_before = is_eos.cumsum(1) - is_eos.long()  # (R, T)
    return [row[before == 0] for row, before in zip(out, eos_before)]


@torch.no_grad()
def plain_sample(model, rows: Sequence, eos: Sequence[int], pad: int, **options) -> list[Tensor]:
    """The definition: Hugging Face `generate`, one row per response, padded on the left."""
    longest = max(len(row) for row in rows)
    ids, mask = [], []
    for row in rows:
        row, gap = [int(token) for token in row], longest - len(row)
        ids.append([pad] * gap + row)
        mask.append([0] * gap + [1] * len(row))
    ids = torch.tensor(ids, device=model.device)  # (R, P)
    mask = torch.tensor(mask, device=model.device)  # (R, P)
    with ready_to_sample(model, eos, pad):
        out = model.generate(ids, attention_mask=mask, **options)  # (R, P + T)
    return until_eos(out[:, longest:], eos)


# ---------------------------------------------------------------------------------------------------------------------
# From here on only efficiency: sampling
# ---------------------------------------------------------------------------------------------------------------------
# Rows of a batch begin alike: all of them with the same schema and instructions, the rows of one prompt also with the
# same question. So the keys and values of a layer lie at three levels, each computed and held once:
#     common  (h, P0, d)        what all R rows share           h: heads of keys and values (one for every `rep` queries)
#     prompt  (h x D, P1, d)    what the rows of a prompt share     D: prompts, n rows each
#     own     (h x R, T, d)     what a row has sampled              R = D x n, grouped by prompt
# With the heads first, the queries of one step, (h x R x rep, d), are the queries of every level by a mere view.

Level = tuple[Tensor, Tensor]  # keys and values, (h x groups, length, d) each: the rows of a group share them

READ_AT_ONCE = {"cpu": 4096, "cuda": 65536}  # tokens in one forward over prompts, the common beginning included
HARMLESS = {"dropout", "is_causal", "position_ids", "use_cache", "output_attentions", "output_hidden_states",
            "return_dict", "output_router_logits", "cache_position"}  # what an attention may be given to no effect


def levels_attention(module, query: Tensor, key: Tensor, value: Tensor, attention_mask, scaling=None, **kwargs):
    """Hugging Face's attention function while `shared_sample` runs: it leaves the work to the layer of the cache.

    Whatever would change the result and is not known here (attention sinks, a softcap, a window, a bias) is an error.
    """
    layer = getattr(key, "layer", None)
    strange = [name for name, x in kwargs.items() if x is not None and name not in HARMLESS]
    if strange or attention_mask is not None or layer is None:
        what = strange or ["a mask or keys of its own"]
        raise NotImplementedError(f"{type(module).__name__} uses {', '.join(what)}: rows cannot share their prompts.")
    layer.attended = True
    out = layer.attend(query, scaling or query.shape[-1] ** -0.5)  # (B, H, Q, d)
    return out.transpose(1, 2), None  # (B, Q, H, d)


# No mask function is registered by this name, so no mask is built: the layers know what is hidden.
AttentionInterface.register("levels", levels_attention)


class PromptLayer(DynamicLayer):
    """One layer while some prompts are read, padded on the right, behind their common beginning.

    Causal attention never looks at padding that follows, so no mask is needed, and long prompts stay cheap (flash).
    """

    def __init__(self, common: Level | None = None) -> None:
        super().__init__()
        self.common = common  # (h, P0, d) each
        self.attended = False

    def get_seq_length(self) -> int:
        return 0 if self.common is None else self.common[0].shape[1]

    def update(self, keys: Tensor, values: Tensor, *args, **kwargs) -> Level:
        self.read = (keys, values)  # (B, h, P1, d) each
        handed = keys[:]  # a view: were it `keys` itself, layer and keys would hold each other in memory
        handed.layer = self  # type: ignore[attr-defined]
        return handed, values

    def attend(self, query: Tensor, scale: float) -> Tensor:
        """(B, H, P1, d) -> the same shape."""
        keys, values = self.read
        mask = None
        if self.common is not None:
            # The common keys are repeated for one layer at a time only.
            behind = [x.expand(len(query), -1, -1, -1) for x in self.common]
            keys, values = torch.cat([behind[0], keys], 2), torch.cat([behind[1], values], 2)  # (B, h, P0 + P1, d)
            mask = causal_lower_right(query.shape[2], keys.shape[2])  # flash attention where there is one
        grouped = query.shape[1] != keys.shape[1]
        return F.scaled_dot_product_attention(query, keys, values, mask, is_causal=mask is None, scale=scale,
                                              enable_gqa=grouped)


class RowLayer(DynamicLayer):
    """One layer while rows are sampled, a token each per step: the levels above, and the rows' own keys and values."""

    def __init__(self, levels: list[Level], hidden: Tensor | None, length: int, most: int) -> None:
        """hidden (D, 1, P1): True where a prompt is padding. length: P0 + P1. most: tokens that a row may get."""
        super().__init__()
        self.levels, self.hidden, self.length, self.most = levels, hidden, length, most
        self.used = 0  # T, tokens that each row has so far
        self.own: list[Tensor] = []  # keys and values, (h x R, room for some more than T, d)
        self.attended = False

    def get_seq_length(self) -> int:
        return self.length + self.used

    def update(self, keys: Tensor, values: Tensor, *args, **kwargs) -> Level:
        """keys, values: (R, h, 1, d)."""
        rows, heads = keys.shape[:2]
        if not self.own:
            self.own = [x.new_empty(rows * heads, 0, x.shape[3]) for x in (keys, values)]
        if self.used == self.own[0].shape[1]:
            # Room for as much again: copied log2(T) times, and never much more than what is used.
            room = min(max(32, 2 * self.used), max(self.most, self.used + 1))
            self.own = [F.pad(old, (0, 0, 0, room - self.used)) for old in self.own]
        for store, new in zip(self.own, (keys, values)):
            store.view(heads, rows, -1, new.shape[3])[:, :, self.used] = new[:, :, 0].transpose(0, 1)
        self.used += 1
        keys.layer = self  # type: ignore[attr-defined]
        return keys, values

    def attend(self, query: Tensor, scale: float) -> Tensor:
        """(R, H, 1, d) -> the same shape: one softmax over the three levels."""
        rows, heads, _, size = query.shape
        shared = query.shape[1] * rows // len(self.own[0])  # rep, the query heads of one key head
        levels = [*self.levels, tuple(store[:, : self.used] for store in self.own)]
        query = (query * scale).view(rows, -1, shared, size).transpose(0, 1).reshape(-1, size)  # (h x R x rep, d)
        scores = []
        for keys, _ in levels:
            score = query.view(len(keys), -1, size) @ keys.transpose(1, 2)  # (h x groups, rows of a group x rep, length)
            if self.hidden is not None and keys is self.levels[-1][0]:
                score.view(-1, len(self.hidden), *score.shape[1:]).masked_fill_(self.hidden, -torch.inf)
            scores.append(score.flatten(0, 1))  # (h x R x rep, length)
        weights = torch.cat(scores, 1).softmax(1)  # (h x R x rep, P0 + P1 + T)
        out = 0
        for (_, values), part in zip(levels, weights.split([score.shape[1] for score in scores], 1)):
            mixed = part.view(len(values), -1, part.shape[1]) @ values  # (h x groups, rows of a group x rep, d)
            out = out + mixed.flatten(0, 1)
        out = out.view(-1, rows, shared, out.shape[1]).transpose(0, 1)  # (R, h, rep, d)
        return out.reshape(rows, heads, 1, -1)


def read_prompts(model, texts: Sequence[Sequence[int]], common: Sequence[Level], pad: int) -> list[Level]:
    """The keys and values of some texts behind a common beginning, a level per layer; zeros where a text is shorter."""
    longest = max(len(text) for text in texts)
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    at_once = READ_AT_ONCE["cpu" if model.device.type == "cpu" else "cuda"]
    levels: list[Level] = []
    waiting = sorted((i for i, text in enumerate(texts) if len(text)), key=lambda i: len(texts[i]))
    while waiting:
        # Neighbours in length are read together, long ones alone.
        some = [waiting.pop()]
        width = len(texts[some[0]])
        behind = common[0][0].shape[1] if common else 0
        while waiting and (len(some) + 1) * (behind + width) <= at_once:
            some.append(waiting.pop())
        ids = [[*texts[i], *[pad] * (width - len(texts[i]))] for i in some]
        cache = Cache(layers=[PromptLayer(common[j] if common else None) for j in range(layers)])
        model(torch.tensor(ids, device=model.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
        check_attended(model, cache)
        for j, layer in enumerate(cache.layers):
            keys, values = layer.read  # type: ignore[union-attr]
            if len(levels) <= j:
                shapes = [(x.shape[1], len(texts), longest, x.shape[3]) for x in (keys, values)]
                levels.append((keys.new_zeros(shapes[0]), values.new_zeros(shapes[1])))
            for store, new in zip(levels[j], (keys, values)):
                store[:, some, :width] = new.transpose(0, 1)  # (h, D, P1, d)
    return levels


def check_attended(model, cache: Cache) -> None:
    """A model with an attention of its own would see only a part of the keys, silently."""
    if not all(layer.attended for layer in cache.layers):  # type: ignore[union-attr]
        raise NotImplementedError(f"{type(model).__name__} has an attention of its own: rows cannot share their prompts.")


@torch.no_grad()
def shared_sample(model, rows: Sequence, eos: Sequence[int], pad: int, **options) -> list[Tensor]:
    """`plain_sample` for rows that share prompts: equal rows are neighbours. Raises NotImplementedError if the model
    turns out to be one that cannot (see `can_share`).
    """
    prompts, counts = [], []
    for prompt, same in groupby([int(token) for token in row] for row in rows):
        prompts.append(prompt)
        counts.append(len(list(same)))
    prefix = len(os.path.commonprefix([prompt[:-1] for prompt in prompts]))
    rests = [prompt[prefix:-1] for prompt in prompts]  # the last token is left to `generate`, which starts from one
    longest = max(len(rest) for rest in rests)
    n = math.gcd(*counts)
    owner = []  # for every n rows the prompt they belong to: one entry a prompt, but where a batch has cut one short
    for i, count in enumerate(counts):
        owner += [i] * (count // n)
    padding = [[0] * len(rest) + [1] * (longest - len(rest)) for rest in rests]
    hidden = torch.tensor(padding, device=model.device)[owner].bool()  # (D, P1)
    last = torch.tensor([prompts[i][-1:] for i in owner], device=model.device)  # (D, 1)
    real = torch.cat([torch.ones_like(last).expand(-1, prefix), ~hidden, torch.ones_like(last)], 1)  # (D, P0 + P1 + 1)
    with ready_to_sample(model, eos, pad):
        model.set_attn_implementation("levels")
        common = read_prompts(model, [prompts[0][:prefix]], [], pad) if prefix else []
        common = [(keys[:, 0], values[:, 0]) for keys, values in common]  # (h, P0, d)
        own = read_prompts(model, rests, common, pad)  # (h, prompts, P1, d)
        cache = Cache(layers=[])
        for j in range(model.config.get_text_config(decoder=True).num_hidden_layers):
            levels = common[j : j + 1]
            for keys, values in own[j : j + 1]:
                if len(owner) > len(prompts):
                    keys, values = keys[:, owner], values[:, owner]
                levels.append((keys.flatten(0, 1), values.flatten(0, 1)))  # (h x D, P1, d)
            cache.layers.append(RowLayer(levels, hidden[:, None] if hidden.any() else None, prefix + longest,
                                         options["max_new_tokens"]))
        # The new ids alone: the mask, as long as all tokens so far, tells `generate` the positions.
        out = model.generate(last.repeat_interleave(n, 0), attention_mask=real.repeat_interleave(n, 0).long(),
                             past_key_values=cache, **cheap_filters(options))  # (R, 1 + T)
    check_attended(model, cache)
    return until_eos(out[:, 1:], eos)


def can_share(model) -> bool:
    """Whether `shared_sample` is right for this model, as far as its class and config tell.

    It is not for layers that keep a window or a state instead of all keys, and not for an attention that adds something
    of its own. What is overlooked here raises NotImplementedError in `levels_attention`.
    """
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder or not getattr(model, "_supports_attention_backend", False):
        return False
    if getattr(config, "attn_logit_softcapping", None) or getattr(config, "alibi", False):
        return False
    if getattr(config, "num_kv_shared_layers", 0):
        return False
    if any(name.endswith("sinks") for name, _ in model.named_parameters()):
        return False
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)


class TopKTopP(LogitsProcessor):
    """Temperature, then top-k, then top-p on what is left: what Hugging Face's three do, the same tokens kept.

    Theirs sorts the whole vocabulary at every step, 152k words for each row, after all but k have been ruled out.
    """

    def __init__(self, temperature: float, top_k: int, top_p: float) -> None:
        self.temperature, self.top_k = temperature, top_k
        self.top_p = TopPLogitsWarper(top_p)

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores / self.temperature  # (R, V)
        best = scores.topk(min(self.top_k, scores.shape[1]))  # (R, k)
        least = best.values[:, -1:]
        width = int((scores >= least).sum(1).max())  # k, or more: tokens that tie with the least are left as well
        places = best.indices if width == best.indices.shape[1] else scores.topk(width).indices
        places = places.sort(1).values  # in the order of the vocabulary, which decides ties in top-p
        left = scores.gather(1, places)  # (R, width)
        left = self.top_p(ids, left.masked_fill(left < least, -torch.inf))
        return torch.full_like(scores, -torch.inf).scatter(1, places, left)


def cheap_filters(options: dict) -> dict:
    """The options for `generate`, with TopKTopP instead of its own filters where those would sort needlessly."""
    top_k, top_p = options.get("top_k", 0), options.get("top_p", 1.0)
    if not options.get("do_sample") or top_k == 0 or top_p == 1.0:
        return options
    own = TopKTopP(options.get("temperature", 1.0), top_k, top_p)
    return {**options, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "logits_processor": [own]}
