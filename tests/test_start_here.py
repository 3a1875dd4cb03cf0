"""The place to begin reading: the three ideas of lse.py, each in a case small enough to work out by hand.

1. A policy learns from rewards alone: a bandit of three arms.
2. A tree of instructions steps back from a bad edit: UCB with numbers.
3. What the policy gradient needs from a language model: the log-probability of what it said.

For readers who know PyTorch and not reinforcement learning. Everything is on the CPU and takes a second.
"""

from __future__ import annotations

import math

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from lse import EvolutionTree, advantages, delta_reward, logprobs, policy_loss

# ---------------------------------------------------------------------------------------------------------------------
# 1. A bandit of three arms
# ---------------------------------------------------------------------------------------------------------------------
# The whole of reinforcement learning that this project needs. An "edit" is one of three arms, the policy a softmax
# over three logits, and nobody tells it which arm is best: it tries, and sees the score of what it tried. There is no
# label and no gradient through the score. The loss makes each tried arm more likely by as much as it was worth, and
# less likely where it was worth less than nothing.

SCORES = torch.tensor([0.2, 0.5, 0.9])  # R̄(c_1): the score after the edit that each arm stands for
BEFORE = 0.5  # R̄(c_0): the score before it. So the arms are worth -0.3, 0 and +0.4 (eq. 7)


def learn_bandit(kind: str, sign: float = 1.0, steps: int = 60) -> torch.Tensor:
    """The policy's probabilities of the three arms, (3,), after some steps of 4 states with 8 tries each."""
    torch.manual_seed(0)
    logits = torch.zeros(3, requires_grad=True)  # all arms alike
    optimizer = torch.optim.SGD([logits], lr=0.5)
    for _ in range(steps):
        logp = logits.log_softmax(0)
        tried = torch.multinomial(logp.detach().exp(), 4 * 8, replacement=True)  # (32,)
        after = SCORES[tried].view(4, 8)  # (N, G)
        before = torch.full((4,), BEFORE)  # (N,)
        valid = torch.ones(4, 8, dtype=torch.bool)
        advantage = sign * advantages(kind, after, before, valid)  # (N, G)
        # Each try is a "response" of one token: a tensor (1,) with the log-probability of the arm.
        responses = list(logp[tried].split(1))
        loss = policy_loss(responses, advantage.flatten(), n_tokens=len(responses))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return logits.detach().softmax(0)


def test_the_reward_of_each_arm_is_what_it_changed() -> None:
    rewards = delta_reward(SCORES, torch.tensor(BEFORE), torch.ones(3, dtype=torch.bool))
    assert rewards.tolist() == pytest.approx([-0.3, 0.0, 0.4])


@pytest.mark.parametrize("kind", ["delta", "grpo"])
def test_the_policy_finds_the_best_arm(kind: str) -> None:
    """From one third each; nothing but `advantages` and `policy_loss` knows what is good."""
    assert learn_bandit(kind)[2] > 0.8


@pytest.mark.parametrize("kind", ["delta", "grpo"])
def test_with_the_sign_flipped_it_finds_the_worst(kind: str) -> None:
    """So the test above is about learning: were the sign of the loss wrong, it would fail."""
    flipped = learn_bandit(kind, sign=-1.0)
    assert flipped[2] < 0.1 and flipped.argmax() == 0


def test_the_gradient_of_one_step_by_hand() -> None:
    """Two arms, both at probability 1/2. Arm 0 was tried once, with advantage 3.

    loss = -3 log p_0, and d log p_0 / d logits = (1 - p_0, -p_1) = (1/2, -1/2), so the gradient is (-3/2, 3/2): a step
    against it raises arm 0 and lowers arm 1.
    """
    logits = torch.zeros(2, requires_grad=True)
    policy_loss([logits.log_softmax(0)[:1]], [3.0], n_tokens=1).backward()
    assert logits.grad.tolist() == pytest.approx([-1.5, 1.5])


# ---------------------------------------------------------------------------------------------------------------------
# 2. UCB steps back from a bad edit
# ---------------------------------------------------------------------------------------------------------------------


def test_the_tree_steps_back_from_a_bad_edit() -> None:
    """Each round takes the node of the greatest R̄ + C sqrt(ln N / v), here with C = 0.5.

    N counts the selections before this round, v those of the node; a node never selected counts as v = 1.
    """
    tree = EvolutionTree("seed", 0.50, c=0.5)

    # Round 1: there is only the seed. Its edit is good.
    assert tree.select("ucb").id == 0
    tree.add(0, "good", 0.60)

    # Round 2: ln N = ln 1 = 0, so no bonus. Seed 0.50, good 0.60: good. But the edit of it is bad.
    assert tree.select("ucb").id == 1
    tree.add(1, "bad", 0.10)

    # Round 3: ln 2 = 0.693, bonus 0.5 * sqrt(0.693 / 1) = 0.416 for each, as all have v = 1 (or 0, which counts as 1).
    #   seed 0.50 + 0.416 = 0.916
    #   good 0.60 + 0.416 = 1.016   <- back to the parent of the bad edit. A chain would go on from 0.10.
    #   bad  0.10 + 0.416 = 0.516
    assert tree.select("ucb").id == 1
    tree.add(1, "no better", 0.55)

    # Round 4: ln 3 = 1.099, bonus 0.5 * sqrt(1.099 / 1) = 0.524; for good, v = 2: 0.5 * sqrt(1.099 / 2) = 0.371.
    #   seed      0.50 + 0.524 = 1.024
    #   good      0.60 + 0.371 = 0.971
    #   bad       0.10 + 0.524 = 0.624
    #   no better 0.55 + 0.524 = 1.074   <- what has been tried twice must wait for what has not
    assert tree.select("ucb").id == 3
    assert tree.nodes[1].visits == 2
    assert tree.best().instructions == "good"  # what the search returns is the best node, never just the last

    chain = EvolutionTree("seed", 0.50)
    chain.add(0, "good", 0.60)
    chain.add(1, "bad", 0.10)
    assert chain.select("chain").instructions == "bad"


# ---------------------------------------------------------------------------------------------------------------------
# 3. The log-probability of what a model said
# ---------------------------------------------------------------------------------------------------------------------


def test_one_log_probability_by_hand() -> None:
    """A language model whose logits we know. log p of a response is the sum over its tokens, each given all before it.

    Token 1 says nothing about what follows (all four logits 0), so each next token has 1/4. After token 2, token 3 has
    logit ln 3 and the others 0: its probability is 3 / (3 + 1 + 1 + 1) = 1/2, theirs 1/6 each.
    """
    model = table_model(torch.tensor([
        [0.0, 0.0, 0.0, 0.0],
        [0.0, 0.0, 0.0, 0.0],  # after token 1
        [0.0, 0.0, 0.0, math.log(3)],  # after token 2
        [0.0, 0.0, 0.0, 0.0],
    ]))
    prompt = torch.tensor([0, 1])
    responses = [torch.tensor([2, 3]), torch.tensor([2, 0, 1])]
    first, second = logprobs(model, prompt, responses)
    assert first.tolist() == pytest.approx([math.log(1 / 4), math.log(1 / 2)], abs=1e-4)
    assert second.tolist() == pytest.approx([math.log(1 / 4), math.log(1 / 6), math.log(1 / 4)], abs=1e-4)

    # At temperature 2 logits are halved: token 3 after 2 has sqrt(3) / (sqrt(3) + 3).
    [warm] = logprobs(model, prompt, responses[:1], temperature=2.0)
    assert warm.tolist() == pytest.approx([math.log(1 / 4), math.log(3**0.5 / (3**0.5 + 3))], abs=1e-4)


def table_model(table: torch.Tensor) -> Qwen3ForCausalLM:
    """A real transformer, rigged so that its logits are a row of `table` (4, 4), the one of the last token.

    Attention and MLP write nothing, so the last token's embedding, one-hot, reaches the output layer as it came in, but
    for the norm: it makes the length sqrt(4) of it.
    """
    config = Qwen3Config(vocab_size=4, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1,
                         num_key_value_heads=1, head_dim=4, tie_word_embeddings=False)
    model = Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(4))
        model.lm_head.weight.copy_(table.T / 2)
    return model


@torch.no_grad()
def test_the_same_by_hand_for_a_model_with_random_weights() -> None:
    """Nothing more than this is meant by "log p": run the model on prompt and response, shift by one, look up."""
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=11, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
                                         num_attention_heads=2, num_key_value_heads=2, head_dim=8)).eval()
    prompt, response = torch.tensor([3, 1, 4]), torch.tensor([1, 5, 9, 2])
    logits = model(torch.cat([prompt, response])[None]).logits[0]  # (7, V): row i is about token i + 1
    by_hand = []
    for place, token in enumerate(response):
        row = logits[len(prompt) + place - 1]  # (V,)
        by_hand.append(float(row[token] - row.logsumexp(0)))
    [ours] = logprobs(model, prompt, [response])
    assert ours.tolist() == pytest.approx(by_hand, abs=1e-5)
