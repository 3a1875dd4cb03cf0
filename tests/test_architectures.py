"""Any model: tiny random ones of many architectures are right the shared way, right the plain way, or refused.

    python -m pytest tests/test_architectures.py
    python tests/test_architectures.py [KIND ...]        the table of these, or of those below, in Markdown

Right means: log-probs and gradients equal those of a plain eager forward, row by row without any padding; greedy
samples equal the argmax of such forwards, token by token; prompts and responses of many lengths.
"""

from __future__ import annotations

import inspect
import random
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

from test_sampling import EOS, FIRST, WORDS, tiny_tokenizer, user, words
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import lse
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
    outcome.logprob = float((learned - naive).detach().abs().max())
    ours, theirs = gradient(model, learned), gradient(eager, naive)
    outcome.gradient = float((ours - theirs).abs().max() / theirs.abs().max())
    return outcome


def table(kinds: list[str]) -> None:
    """One row per architecture. Its errors are the greatest ones, those of `verify` are means over tokens."""
    print("| architecture | way | verify, float32 | verify, bfloat16 | log-probs | gradient | greedy samples | why |")
    print("|---" * 8 + "|")
    for kind in kinds:
        outcome = examine(kind)
        if outcome.way == "refused":
            print(f"| {kind} | refused | | | | | | {outcome.said} |", flush=True)
            continue
        rough = examine(kind, torch.bfloat16, thorough=False)
        samples = "equal" if outcome.samples else "DIFFERENT"
        print(f"| {kind} | {outcome.way} | {outcome.verified:.0e} | {rough.verified:.0e} | {outcome.logprob:.0e} | "
              f"{outcome.gradient:.0e} | {samples} | {outcome.said} |", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Every architecture ends in one of three ways
# ---------------------------------------------------------------------------------------------------------------------

EXPECTED = {
    "shared": "llama qwen2 qwen2_moe qwen3 qwen3_moe gemma gpt2 gpt_neox opt phi smollm3 granite granitemoe olmo2 glm4 "
    "nemotron cohere",
    # windows, a softcap, sinks, biases, attentions of their own
    "plain": "mistral phi3 gemma2 gemma3_text gemma4_text gpt_oss bloom mpt falcon gptj codegen gpt_neo llama4_text "
    "deepseek_v3 stablelm diffllama "
    # states instead of keys
    "mamba mamba2 falcon_mamba falcon_h1 jamba bamba minimax lfm2 qwen3_next qwen3_5_text granitemoehybrid nemotron_h "
    "recurrent_gemma olmo_hybrid kimi_linear",
    # RWKV goes on from a state that is not that of its forward pass; BERT looks ahead
    "refused": "rwkv bert",
}
WAYS = [(kind, way) for way, kinds in EXPECTED.items() for kind in kinds.split()]


@pytest.mark.parametrize("kind, way", WAYS)
def test_an_architecture_is_right_or_refused(kind: str, way: str) -> None:
    outcome = examine(kind)
    assert outcome.way == way, outcome
    if way == "refused":
        assert "cannot be used here: " in outcome.said and "\n" not in outcome.said
        return
    assert outcome.samples
    assert outcome.logprob < 1e-5 and outcome.gradient < 2e-5
    assert outcome.verified < 1e-5


# ---------------------------------------------------------------------------------------------------------------------
# What `verify` finds, and what it leaves alone
# ---------------------------------------------------------------------------------------------------------------------


def verified(local: LocalModel, **options):
    return verify(local, ragged_chats()[:4], new=8, **options)


@pytest.mark.parametrize("kind", ["gpt_oss", "gemma2", "bloom", "mpt", "mistral", "qwen3_next", "jamba", "gptj"])
def test_a_model_that_is_taken_for_one_that_shares_is_found_out(kind: str) -> None:
    """As if `can_share` had overlooked it: the shared way is dropped, for good, and what is left is right."""
    local = LocalModel(tiny(kind), tiny_tokenizer())
    local.share = True
    check = verified(local)
    assert check.way == "plain" and check.dropped and not local.share
    assert check.error < 1e-5 and "the shared way is wrong for this model" in str(check)
    sample = local.sample([user("w1 w2 w3")], max_new_tokens=4, temperature=0)[0][0]
    assert sample.ids.tolist() == argmax_loop(tiny(kind), sample.prompt_ids.tolist(), 4)


def broken_attention(module, query, key, value, attention_mask, **kwargs):
    """Responses look at each other, which nothing else would notice."""
    if attention_mask is not None and attention_mask.shape[2] < query.shape[2]:
        attention_mask = attention_mask | torch.ones_like(attention_mask).tril(key.shape[2] - attention_mask.shape[2])
    return lse.shared_prompt_attention(module, query, key, value, attention_mask, **kwargs)


def test_a_silent_mistake_of_the_shared_learner_is_found(monkeypatch) -> None:
    local = LocalModel(tiny("llama"), tiny_tokenizer())
    assert verified(local).way == "shared"
    monkeypatch.setitem(transformers.AttentionInterface._global_mapping, "shared_prompt", broken_attention)
    local.model.set_attn_implementation("sdpa")
    check = verified(local)
    assert check.way == "plain" and "nats per token off" in check.dropped and check.error < 1e-5
    assert local.model.config._attn_implementation == "sdpa"


def test_a_silent_mistake_of_the_shared_sampler_is_found(monkeypatch) -> None:
    """Padding that is read: the first token of each prompt's rest is taken for padding."""
    real = lse.prefill

    def wrong(model, shape, mask, pad, new):
        mask[:, shape.prefix] = 0
        return real(model, shape, mask, pad, new)

    monkeypatch.setattr(lse, "prefill", wrong)
    check = verified(LocalModel(tiny("llama"), tiny_tokenizer()))
    assert check.way == "plain" and "nats per token off" in check.dropped


def test_where_the_plain_way_is_wrong_too_nothing_is_learned(monkeypatch) -> None:
    real = lse.plain_sample

    def hotter(*args, **options):
        return real(*args, **options | {"temperature": 1.3})

    monkeypatch.setattr(lse, "plain_sample", hotter)
    local = LocalModel(tiny("gemma2"), tiny_tokenizer())
    with pytest.raises(ValueError, match="Gemma2ForCausalLM cannot be used here: .* differ by .* nats per token"):
        verified(local)


def test_dropout_in_the_learner_is_found() -> None:
    """GPT-2 has dropout, and gradient checkpointing needs train mode."""
    local = LocalModel(tiny("gpt2"), tiny_tokenizer())
    with pytest.raises(ValueError, match="What it samples is not what it computes"):
        verified(local, checkpointing=True)
    assert not local.model.training


def test_a_model_that_changes_its_own_weights_is_refused() -> None:
    model = tiny("llama")


    def rescale(*_) -> None:
        model.lm_head.weight.data *= 1 + 1e-6

    model.register_forward_hook(rescale)
    with pytest.raises(ValueError, match="computing with it changes its weights"):
        verified(LocalModel(model, tiny_tokenizer()))


def test_weights_that_are_not_finite_are_refused() -> None:
    model = tiny("llama")
    model.lm_head.weight.data[3] = torch.nan
    with pytest.raises(ValueError, match="differ by nan nats"):
        verified(LocalModel(model, tiny_tokenizer()))


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
@pytest.mark.parametrize("training", [True, False])
def test_verifying_moves_nothing(kind: str, training: bool) -> None:
    local = LocalModel(tiny(kind), tiny_tokenizer())
    local.model.train(training)
    before = {name: p.clone() for name, p in local.model.named_parameters()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, second = verified(local), verified(local)
    assert torch.equal(torch.rand(3), expected) and first == second
    assert local.usage == lse.Usage() and local.model.training == training
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in local.model.named_parameters())


def test_rows_of_many_lengths_come_back_in_order_the_plain_way() -> None:
    """A batch of several lengths is split, and each chat gets its own responses."""
    local = LocalModel(tiny("mamba"), tiny_tokenizer(), max_batch_tokens=60)
    chats = ragged_chats()
    for chat, row in zip(chats, local.sample(chats, n=3, max_new_tokens=4)):
        assert all(sample.prompt_ids.tolist() == local.encode(chat) for sample in row)
        assert len(row) == 3
    alone = [local.sample([chat], max_new_tokens=4, temperature=0)[0][0].ids.tolist() for chat in chats]
    together = [row[0].ids.tolist() for row in local.sample(chats, max_new_tokens=4, temperature=0)]
    assert alone == together


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    table(sys.argv[1:] or [kind for kind, _ in WAYS])
