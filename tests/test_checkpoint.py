"""A checkpoint that we save is the same model elsewhere: it keeps the files of the one that it was trained from.

Measured by hand with transformers 4.57 in an environment of its own: see the log-probs in the note of issue 13.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from make_base import mini_tokenizer
from test_architectures import tiny
from test_sampling import tiny_tokenizer, user
from tiny import random_base
from transformers import AutoModelForCausalLM

import evolve
from lse import LocalModel, MasterAdamW, policy_loss

PROMPT = user("solve item 1 profit")


def old_checkpoint(folder: Path) -> Path:
    """As transformers 4 writes one: the RoPE base under its old name, special tokens in a file of their own."""
    random_base(folder)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    del config["rope_parameters"]
    config |= {"rope_theta": 1e5, "rope_scaling": None, "transformers_version": "4.57.6"}
    file.write_text(json.dumps(config, indent=1, sort_keys=True))
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<|end|>"}')
    (folder / "generation_config.json").write_text('{"top_k": 7, "eos_token_id": 76}\n')
    (folder / "README.md").write_text("Not about the weights.")
    (folder / "pytorch_model.bin").write_bytes(b"old weights")
    return folder


def one_step(model: LocalModel) -> None:
    """Something is learned."""
    torch.manual_seed(0)
    [[sample]] = model.sample([PROMPT], max_new_tokens=4)
    logps = sum(model.group_logprobs([(sample.prompt_ids, [sample.ids])]), [])
    policy_loss(logps, [1.0], len(sample.ids)).backward()
    MasterAdamW(model.model, lr=1e-2).step()


def test_only_the_weights_of_a_trained_editor_are_new(tmp_path: Path) -> None:
    source, out = old_checkpoint(tmp_path / "source"), tmp_path / "editor"
    editor = evolve.load_model(source)
    one_step(editor)
    evolve.save_model(editor, out)
    kept = ["chat_template.jinja", "config.json", "generation_config.json", "special_tokens_map.json", "tokenizer.json",
            "tokenizer_config.json"]  # fmt: skip
    assert sorted(file.name for file in out.iterdir()) == sorted([*kept, "model.safetensors"])
    for name in kept:
        assert (out / name).read_bytes() == (source / name).read_bytes(), name
    assert (out / "model.safetensors").read_bytes() != (source / "model.safetensors").read_bytes()
    again = evolve.load_model(out)
    for name, weight in editor.model.state_dict().items():
        assert torch.equal(weight, again.model.state_dict()[name]), name
    assert again.model.config.rope_parameters["rope_theta"] == 1e5
    assert again.encode(PROMPT) == editor.encode(PROMPT) and again.eos == editor.eos


def test_the_shipped_editor_has_the_files_of_its_base() -> None:
    base, editor = evolve.MINIATURE / "base", evolve.MINIATURE / "editor"
    for file in base.iterdir():
        if file.suffix != ".safetensors":
            assert (editor / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_model_may_be_saved_into_its_own_source(tmp_path: Path) -> None:
    source = old_checkpoint(tmp_path / "source")
    before = (source / "config.json").read_bytes()
    editor = evolve.load_model(source)
    one_step(editor)
    evolve.save_model(editor, source)
    assert (source / "config.json").read_bytes() == before
    assert torch.equal(evolve.load_model(source).model.lm_head.weight, editor.model.lm_head.weight)


@pytest.mark.parametrize("gone", [False, True])
def test_without_a_source_both_spellings_are_written(tmp_path: Path, gone: bool) -> None:
    """A model made in memory, and one whose source is not there any more."""
    if gone:
        source = old_checkpoint(tmp_path / "source")
        model = evolve.load_model(source)
        shutil.rmtree(source)
    else:
        source_model = evolve.load_model(old_checkpoint(tmp_path / "source")).model
        memory = type(source_model)(source_model.config)
        memory.name_or_path = ""
        model = LocalModel(memory, mini_tokenizer())
    evolve.save_model(model, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 1e5
    tokenizer = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast" and "extra_special_tokens" not in tokenizer
    again = evolve.load_model(tmp_path / "out")
    assert again.encode(PROMPT) == model.encode(PROMPT)
    assert again.model.config.rope_parameters["rope_theta"] == 1e5


@pytest.mark.parametrize("kind", ["gemma3_text", "gpt2", "phi", "mamba"])
def test_every_kind_of_position_survives_both_spellings(tmp_path: Path, kind: str) -> None:
    """Two RoPE bases, none, a part of a head, a state: what we write we read as the same model."""
    model = tiny(kind)
    evolve.save_model(LocalModel(model, tiny_tokenizer()), tmp_path / kind)
    config = json.loads((tmp_path / kind / "config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / kind)
    ids = torch.randint(5, 80, (1, 20))
    assert torch.equal(model(ids).logits, again(ids).logits)
    assert ("rope_theta" in config) == ("rope_parameters" in config)
    if kind == "gemma3_text":
        assert (config["rope_theta"], config["rope_local_base_freq"]) == (1e6, 1e4)
    if kind == "phi":
        assert config["partial_rotary_factor"] == 0.5


def test_scaled_rope_is_spelled_out(tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e4}
    (tmp_path / "config.json").write_text(json.dumps({"rope_parameters": rope}))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    evolve.spell_for_old_readers(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["rope_theta"] == 5e4 and config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    assert config["rope_parameters"] == rope
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "Qwen2Tokenizer"
