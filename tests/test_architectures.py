"""Any model: tiny random ones of many architectures are right the shared way, right the plain way, or refused.

    python -m pytest tests/test_architectures.py
    python tests/test_architectures.py [KIND ...]          the table, in Markdown; of all kinds that transformers has: all

Right means: log-probs and gradients equal those of a plain eager forward, row by row without any padding; greedy
samples equal the argmax of such forwards, token by token; prompts and responses of many lengths.
"""

from __future__ import annotations

import inspect
import random
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

from test_sampling import EOS, FIRST, WORDS, tiny_tokenizer, user, words
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lse import LocalModel, verify

VOCAB = FIRST + WORDS
# What makes a config tiny, whatever its architecture calls it; an architecture takes what it knows.
SIZES: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    initializer_range=0.3,  # far from flat distributions: a wrong attention shows
    pad_token_id=0,
    eos_token_id=EOS,
    bos_token_id=None,
    sliding_window=16,
    # experts
    moe_intermediate_size=24,
    shared_intermediate_size=24,
    shared_expert_intermediate_size=24,
    num_experts=4,
    num_local_experts=4,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
    # low-rank attention
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_rope_head_dim=4,
    qk_nope_head_dim=8,
    v_head_dim=8,
    # linear attention and state spaces
    linear_num_value_heads=4,
    linear_num_key_heads=2,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    mamba_d_state=8,
    mamba_n_heads=4,
    mamba_d_head=16,
    mamba_n_groups=1,
    mamba_chunk_size=8,
    mamba_d_ssm=64,
    use_mamba_kernels=False,
)
# What some architectures need besides.
BOTH = ["linear_attention", "full_attention"]
MORE: dict[str, dict[str, Any]] = {
    # of both kinds of layers, of which the usual two would be one
    "bamba": dict(attn_layer_indices=[1]),
    "granitemoehybrid": dict(layer_types=BOTH),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1, mamba_dt_rank=4),
    "kimi_linear": dict(layer_types=BOTH, num_key_value_heads=4, linear_head_dim=8, linear_num_heads=4),
    "lfm2": dict(layer_types=["conv", "full_attention"]),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"], num_dense_layers=1),
    "nemotron_h": dict(layers_block_type=[*BOTH, "mlp"], ssm_state_size=8, mamba_num_heads=4, mamba_head_dim=16,
                       n_groups=1, chunk_size=8, initializer_range=0.1),
    "qwen3_5_text": dict(layer_types=BOTH),
    "qwen3_next": dict(layer_types=BOTH),
    "recurrent_gemma": dict(num_hidden_layers=3, attention_window_size=16),
    "zamba2": dict(layers_block_type=["linear_attention", "hybrid"], hybrid_layer_ids=[1], n_mamba_heads=4,
                   mamba_headdim=16, kv_channels=8, attention_head_dim=16, chunk_size=8, num_key_value_heads=4),
    # sizes under names of their own
    "codegen": dict(rotary_dim=8),
    "deepseek_v3": dict(num_key_value_heads=4, head_dim=4),
    "gemma4_text": dict(vocab_size_per_layer_input=VOCAB, hidden_size_per_layer_input=8, num_global_key_value_heads=2),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]], window_size=16),
    "gptj": dict(rotary_dim=8),
    "mamba2": dict(num_heads=4, head_dim=16, state_size=8, chunk_size=8, n_groups=1),
    "xlstm": dict(chunk_size=8, qk_dim_factor=0.5, v_dim_factor=1.0, num_heads=4),
}


def tiny(kind: str, attention: str | None = None):
    """A random model of this architecture, float32, in eval mode."""
    config_class = CONFIG_MAPPING[kind]
    known = set(inspect.signature(config_class.__init__).parameters)
    known |= set(vars(config_class())) | set(getattr(config_class, "attribute_map", {}))
    settings = {name: value for name, value in SIZES.items() if name in known}
    config = config_class(**settings | MORE.get(kind, {}))
    torch.manual_seed(0)
    options = {"attn_implementation": attention} if attention else {}
    return AutoModelForCausalLM.from_config(config, **options).eval()


def ragged_chats() -> list[list[dict[str, str]]]:
    """With common beginnings and without, longer than the window of 16, down to a few tokens."""
    rng = random.Random(0)
    shared = words(rng, 12, 12)
    chats = [user(words(rng, 1, 25)) for _ in range(3)]
    chats += [[{"role": "system", "content": shared}, *user(words(rng, 1, 9))] for _ in range(2)]
    return [*chats, user("w1")]


def argmax_loop(model, prompt: list[int], new: int) -> list[int]:
    """Greedy tokens, each by a forward pass over all before it: no cache, no padding."""
    ids = list(prompt)
    while len(ids) < len(prompt) + new and (len(ids) == len(prompt) or ids[-1] != EOS):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def naive_logprobs(model, groups) -> torch.Tensor:
    """Of all response tokens, by a forward pass per row."""
    out = []
    for prompt, responses in groups:
        for response in responses:
            row = torch.cat([prompt, response])
            every = model(row[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            out.append(every.gather(1, response[:, None])[:, 0])
    return torch.cat(out)


def gradient(model, logps: torch.Tensor) -> torch.Tensor:
    """Of a random weighting of all log-probs: a mix-up of rows or tokens cannot cancel."""
    weights = torch.randn(len(logps), generator=torch.Generator().manual_seed(0)) / len(logps)
    model.zero_grad()
    (logps * weights).sum().backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return torch.cat([grad.flatten() for grad in grads])


@dataclass
class Outcome:
    """What became of one architecture."""

    way: str  # "shared", "plain" or "refused"
    said: str = ""
    verified: float = 0.0  # the figure of `verify`, nats per token
    logprob: float = 0.0  # greatest difference of a log-prob from the plain eager forward
    gradient: float = 0.0  # ... of the gradient, relative to its largest entry
    samples: bool = True  # greedy samples are those of the argmax loop


def examine(kind: str, dtype: torch.dtype = torch.float32, thorough: bool = True) -> Outcome:
    """Verify a tiny model of this architecture as a run does, and then look for ourselves."""
    model = tiny(kind).to(dtype)
    local = LocalModel(model, tiny_tokenizer())
    chats = ragged_chats()
    try:
        check = verify(local, chats[:4], new=8)
    except ValueError as error:
        return Outcome("refused", str(error))
    outcome = Outcome(check.way, check.dropped, check.error)
    if not thorough:
        return outcome
    try:
        eager = tiny(kind, "eager")
    except ValueError:  # has no such choice
        eager = tiny(kind)
    eager.load_state_dict(model.state_dict())
    samples = [row[0] for row in local.sample(chats, max_new_tokens=5, temperature=0)]
    with torch.no_grad():
        for sample in samples:
            if sample.ids.tolist() != argmax_loop(eager, sample.prompt_ids.tolist(), 5):
                outcome.samples = False
    groups = []
    for sample, size in zip(samples, (3, 1, 2)):
        responses = [torch.randint(1, VOCAB, (length,)) for length in (7, 1, 12)[:size]]
        groups.append((sample.prompt_ids, responses))
    learned = torch.cat([logp for group in local.group_logprobs(groups) for logp in group])
    naive = naive_logprobs(eager, groups)
    outcome.logprob = float((learned - naive).abs().max())
    ours, theirs = gradient(model, learned), gradient(eager, naive)
    outcome.gradient = float((ours - theirs).abs().max() / theirs.abs().max())
    return outcome


def table(kinds: list[str]) -> None:
    print("| architecture | way | verified, float32 | bfloat16 | log-probs | gradient | greedy | s | |")
    print("|---" * 9 + "|")
    for kind in kinds:
        started = time.time()
        try:
            outcome = examine(kind)
        except Exception as error:
            print(f"| {kind} | TRACEBACK {type(error).__name__} {str(error)[:150]!r}")
            continue
        try:
            half = examine(kind, torch.bfloat16, thorough=False)
            rough = f"{half.verified:.1e} {half.way}{half.said}"
        except Exception as error:
            rough = repr(error)[:50]
        print(f"| {kind} | {outcome.way} | {outcome.verified:.1e} | {rough} | {outcome.logprob:.1e} | "
              f"{outcome.gradient:.1e} | {outcome.samples} | {time.time() - started:.1f} | {outcome.said} |", flush=True)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    names = sys.argv[1:]
    if names == ["all"]:
        names = list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    table(names)
