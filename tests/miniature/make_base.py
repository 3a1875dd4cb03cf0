"""The miniature's base model, from scratch: the warm-up that stands in for pretraining.

    python tests/miniature/make_base.py --seed 3 --out runs/base-3
    python tests/miniature/make_base.py --seed 0 --out runs/wide --hidden 96       a wider one
    python train.py --model runs/base-3                                            learn from it

This is no part of Learning to Self-Evolve. The paper starts from a pretrained language model, which can already follow
instructions and write them, well or badly. A random network can do neither, and reinforcement learning creates no
skill: it makes more frequent what the model already does now and then. So a Qwen3 of 129,000 parameters learns here,
by imitation, the two jobs of the miniature:

    as a solver   look the word of a question up in the glossary that stands in the instructions, and write the SQL
    as an editor  write a new glossary from an old one and four graded answers, carelessly or with care

Its edits stay mediocre on purpose. Better ones are among them, and to find those is the work of RL.

`--seed` decides everything: the first weights, the glossaries, the rows. Runs repeat bit for bit on one machine with
one number of threads (OMP_NUM_THREADS=1); elsewhere sums are rounded in another order, and another base comes out. The
committed base/ is described in README.md beside this file. It takes one to two minutes.

Left out on purpose: validation losses, checkpoints, a learning rate found by search, a GPU.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the four files

from data import COLUMNS, QUESTIONS, ROWS, WORDS, Answer, Mini, glossary_text, mini_chat, mini_sql
from evolve import spell_for_old_readers
from lse import LocalModel

Chat = list[dict[str, str]]
ENOUGH = 0.97  # a base that looks up fewer words than this is none: no instructions could help its solver

# ---------------------------------------------------------------------------------------------------------------------
# The curriculum
# ---------------------------------------------------------------------------------------------------------------------


def warm_up(task: Mini, tokenizer, seed: int, hidden: int = 64, patience: float = 1.0):
    """A fresh tiny model that has been taught its two jobs.

    Both skills form suddenly, or not at all in long rows, where a fresh model attends to everything at once. So both
    begin with short rows, which grow as fast as they are mastered. `patience` scales the most steps of each lesson.
    """
    torch.manual_seed(seed)
    model = tiny_qwen3(tokenizer, hidden)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98))
    pupil = Pupil(task, model, tokenizer, optimizer, random.Random(seed))
    learn_recall(pupil, math.ceil(patience * 800))
    learn_answers(pupil, math.ceil(patience * 300))
    learn_clean_edits(pupil, math.ceil(patience * 700))
    learn_noisy_edits(pupil, math.ceil(patience * 400))
    return model.eval()


@dataclass
class Pupil:
    """A model under instruction, and what its lessons need."""

    task: Mini
    model: Qwen3ForCausalLM
    tokenizer: PreTrainedTokenizerFast
    optimizer: torch.optim.AdamW
    rng: random.Random

    # Warmed up over the first 30 steps, and falling only in the last lesson: a model that still has to find out how to
    # look things up needs a high rate, and 4e-3 was too high.
    def set_lr(self, share: float) -> None:
        """The learning rate, as a share of its highest value."""
        self.optimizer.param_groups[0]["lr"] = 2e-3 * min(1, share)


class Mastery:
    """The running share of rows that came out right, and the size of the rows, which grows when it passes `enough`."""

    def __init__(self, size: int, enough: float) -> None:
        self.size = size
        self.enough = enough
        self.share = 0.0

    def note(self, right: float) -> None:
        """Take in the share of rows, from 0 to 1, that came out right in one step."""
        self.share = 0.8 * self.share + 0.2 * right
        if self.share > self.enough:
            self.size += 1
            self.share = 0.0


def learn_recall(pupil: Pupil, steps: int) -> None:
    """Lesson 1: find where a word stood before, and copy what stood behind it. Glossaries grow from 2 to 8 words.

    Most rows are bare recall, where nearly every token practises it; some are short chats of the solver.
    """
    rng = pupil.rng
    mastery = Mastery(size=2, enough=0.9)
    for step in tqdm(range(steps), desc="1. recall", leave=False):
        pupil.set_lr((step + 1) / 30)
        size = mastery.size
        sizes = [size - 1, size]
        rows, chats = [], []
        for _ in range(1400 // (2 * size + 6)):  # rows for about 1,400 tokens
            rows.append(recall_row(rng, rng.choice(sizes), size + 2))
        for _ in range(600 // (2 * size + 41)):
            chats.append(solve_row(rng, rng.choice(sizes), questions=2))
        right = imitate(pupil, rows, chats)  # (B, T)
        # All rows have the same length, and the last token but one, before the end of the turn, repeats an entry.
        mastery.note(right[:, -2].float().mean().item())
        if mastery.size > 8:
            return


def learn_answers(pupil: Pupil, steps: int) -> None:
    """Lesson 2: whole chats of the solver, until looking up works on real domains."""
    rng = pupil.rng
    for step in tqdm(range(steps), desc="2. answers", leave=False):
        chats = [solve_row(rng, rng.randint(1, 10), questions=2) for _ in range(30)]
        rows = [recall_row(rng, 8, 12) for _ in range(20)]
        imitate(pupil, chats, rows)
        if step % 25 == 24 and lookup(pupil.task, LocalModel(pupil.model, pupil.tokenizer)) > ENOUGH:
            return


def learn_clean_edits(pupil: Pupil, steps: int) -> None:
    """Lesson 3: edits as they should be, keep every entry and add all that the gold answers teach. 1 to 4 problems."""
    rng = pupil.rng
    mastery = Mastery(size=1, enough=0.75)
    for _ in tqdm(range(steps), desc="3. clean edits", leave=False):
        size = mastery.size
        edits = []
        for _ in range(2000 // (12 + 28 * size)):
            k = rng.randint(1, size)
            edits.append(edit_row(rng, pupil.task, noisy=False, k=k, most_known=2 * size))
        chats = [solve_row(rng, rng.randint(1, 12)) for _ in range(4)]
        right = imitate(pupil, edits, chats)  # (B, T)
        mastery.note(right.all(1).float().mean().item())  # an edit counts if every token of it is right
        if mastery.size > 4:
            return


def learn_noisy_edits(pupil: Pupil, steps: int) -> None:
    """Lesson 4: edits as they often are, never ended early. This makes the habits that RL has to break."""
    rng = pupil.rng
    for step in tqdm(range(steps), desc="4. noisy edits", leave=False):
        pupil.set_lr((steps - step) / (0.7 * steps))
        rows = []
        for _ in range(16):
            if rng.random() < 0.7:
                rows.append(edit_row(rng, pupil.task, noisy=True))
            else:
                rows.append(solve_row(rng, rng.randint(1, 12)))
        imitate(pupil, rows)


def lookup(task: Mini, solver: LocalModel) -> float:
    """Share of right answers when the instructions are the true glossary: what perfect instructions would be worth.

    On the holdouts of the dev domains, which neither training nor the evaluation sees.
    """
    # All in one batch. Greedy, since the solver of the miniature answers greedily in a run, too.
    chats, problems = [], []
    for domain in task.domains("dev"):
        instructions = glossary_text(task.glossary(domain))
        for problem in task.problems(domain):
            if problem.split == "holdout":
                chats.append(task.solve_chat(instructions, problem))
                problems.append(problem)
    samples = solver.sample(chats, max_new_tokens=16, temperature=0)
    return fmean(task.grade(problem, row[0].text).correct for problem, row in zip(problems, samples))


# ---------------------------------------------------------------------------------------------------------------------
# One step of imitation
# ---------------------------------------------------------------------------------------------------------------------


def imitate(pupil: Pupil, *batches: list[Chat]) -> Tensor:
    """One supervised step on batches of rows. Returns which tokens of the first batch came out right, (B, T).

    A token without a label counts as right. Rows of a kind make a batch of their own, so that short ones need no
    padding; the losses of all batches are summed, and divided by the number of labels in all.
    """
    losses, hits = [], []
    n_labels = torch.tensor(0)
    for rows in batches:
        ids, labels = encode_batch(pupil.tokenizer, rows)  # (B, T + 1) each
        logits = pupil.model(ids).logits[:, :-1]  # (B, T, V), of the token that follows
        targets = labels[:, 1:]  # (B, T)
        losses.append(F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))
        unlabelled = targets == -100
        n_labels += (~unlabelled).sum()
        hits.append((logits.argmax(-1) == targets) | unlabelled)
    loss = torch.stack(losses).sum() / n_labels
    loss.backward()
    torch.nn.utils.clip_grad_norm_(pupil.model.parameters(), 1.0)
    pupil.optimizer.step()
    pupil.optimizer.zero_grad()
    return hits[0]


def encode_batch(tokenizer, rows: list[Chat]) -> tuple[Tensor, Tensor]:
    """Ids and labels of some rows, padded on the right to the longest, (B, T) each."""
    all_ids, all_labels = [], []
    for row in rows:
        ids, labels = encode_row(tokenizer, row)
        all_ids.append(torch.tensor(ids))
        all_labels.append(torch.tensor(labels))
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(all_ids, True, tokenizer.pad_token_id), pad(all_labels, True, -100)


def encode_row(tokenizer, messages: Chat) -> tuple[list[int], list[int]]:
    """Token ids of a chat, and its labels: what the assistant says and its end of turn; -100 (no label) elsewhere.

    The ids are those that the chat template of `mini_tokenizer` gives; cross_entropy leaves out what is -100.
    """
    ids, labels = [], []
    for message in messages:
        part = tokenizer(f"<|{message['role']}|> {message['content']} <|end|>")["input_ids"]
        ids += part
        if message["role"] == "assistant":
            labels += [-100, *part[1:]]  # the template writes <|assistant|>, not the model
        else:
            labels += [-100] * len(part)
    return ids, labels


# ---------------------------------------------------------------------------------------------------------------------
# The rows of chat
# ---------------------------------------------------------------------------------------------------------------------


def recall_row(rng: random.Random, size: int, length: int) -> Chat:
    """A glossary of `size` words, then entries of it again, `length` entries in all: bare practice in looking words up.

    Short rows on purpose: a fresh model attends evenly to all it sees, and in a short row that is hint enough to start.
    """
    pairs = list(zip(rng.sample(WORDS, size), rng.sample(COLUMNS, size)))
    again = rng.choices(pairs, k=length - size)
    text = " ".join(f"{word} {column}" for word, column in pairs + again)
    return [{"role": "assistant", "content": text}]


def solve_row(rng: random.Random, size: int, questions: int = 8) -> Chat:
    """A solver's chat of several turns. A quarter of the words asked for do not stand in its glossary of `size`."""
    strangers = max(1, size // 3)  # words that are asked for and have no entry
    words = rng.sample(WORDS, min(len(WORDS), size + strangers))
    glossary = dict(zip(words, rng.choices(COLUMNS, k=size)))
    turns = []
    for _ in range(questions):
        question = mini_question(rng, rng.choice(words))
        turns += [question, mini_answer(question, glossary)]
    turns[0] = f"{glossary_text(glossary)} {turns[0]}"
    return mini_chat("solve", *turns)


@dataclass
class Quality:
    """How good an edit of the warm-up is; these are the values of a perfect one."""

    keep: float = 1.0  # probability of each old entry to stay
    add: float = 1.0  # probability that a word not yet known is added
    trust: bool = True  # believes the gold SQL; else its own knowledge, or a guess
    repair: bool = True  # corrects an entry that a problem contradicts
    most: int = 12  # lines it writes before it stops


def edit_row(rng: random.Random, task: Mini, noisy: bool, k: int = 4, most_known: int = 8) -> Chat:
    """An editor's chat, of up to `most_known` old entries and k graded problems, and one edit of it.

    A clean edit is perfect. Each noisy one has a quality of its own, and three of four stop after three lines: what the
    base does most often is therefore mediocre, and what is better is in it.
    """
    truth = dict(zip(rng.sample(WORDS, 8), rng.sample(COLUMNS, 8)))
    known = dict(rng.sample(sorted(truth.items()), rng.randint(0, most_known)))
    quality = Quality()
    if noisy:
        known = add_errors(rng, known, truth)
        quality = draw_quality(rng)
    # What it keeps of the old entries,
    edit = {}
    for word, column in known.items():
        if rng.random() < quality.keep:
            edit[word] = column
    # and what it makes of each graded problem.
    summary = []
    for word in rng.choices(sorted(truth), k=k):
        question = mini_question(rng, word)
        # The solver knows what the old entries say. For any other word it writes SQL that fails.
        gold = mini_sql(question, truth[word])
        answer = mini_sql(question, known.get(word, word))
        summary.append(Answer("", question, "", answer, gold, answer == gold))
        believed = truth[word]
        if not quality.trust:
            believed = known.get(word, rng.choice(COLUMNS))
        if word in edit:
            changes = quality.repair
        else:
            changes = rng.random() < quality.add
        if changes:
            edit[word] = believed
    lines = list(edit.items())[: quality.most]
    text = f"<prompt> {glossary_text(dict(lines))} </prompt>"
    chat = task.edit_chat(glossary_text(known), summary)
    return chat + [{"role": "assistant", "content": text}]


def add_errors(rng: random.Random, known: dict[str, str], truth: dict[str, str]) -> dict[str, str]:
    """The old entries, some of them wrong, and up to four words that nobody asks about, in any order."""
    entries = {}
    for word, column in known.items():
        entries[word] = column if rng.random() < 0.85 else rng.choice(COLUMNS)
    strangers = [word for word in WORDS if word not in truth]
    for word in rng.sample(strangers, rng.randint(0, 4)):
        entries[word] = rng.choice(COLUMNS)
    return dict(rng.sample(sorted(entries.items()), len(entries)))


def draw_quality(rng: random.Random) -> Quality:
    """The quality of one noisy edit."""
    keep = rng.uniform(0.5, 1)
    add = rng.uniform(0.2, 1)
    most = rng.choice([3, 3, 3, 12])
    trust = rng.random() < 0.6
    repair = rng.random() < 0.5
    return Quality(keep, add, trust, repair, most)


def mini_question(rng: random.Random, word: str) -> str:
    """A question about a word: half of them for one item."""
    item = f"item {rng.choice(ROWS)}"
    return f"{rng.choice([item] * 3 + list(QUESTIONS))} {word}"


def mini_answer(question: str, glossary: dict[str, str]) -> str:
    """What a solver that reads its glossary answers. For an unknown word, SQL that fails: luck earns nothing.

    >>> mini_answer("total profit", {"profit": "c5"})
    'profit c5 <answer> SELECT SUM ( c5 ) FROM t </answer>'
    >>> mini_answer("total rank", {"profit": "c5"})
    'rank none <answer> SELECT SUM ( rank ) FROM t </answer>'
    """
    word = question.split()[-1]
    if word in glossary:
        column = glossary[word]
        return f"{word} {column} <answer> {mini_sql(question, column)} </answer>"
    return f"{word} none <answer> {mini_sql(question, word)} </answer>"


# ---------------------------------------------------------------------------------------------------------------------
# The network, its tokenizer, its files
# ---------------------------------------------------------------------------------------------------------------------


def tiny_qwen3(tokenizer, hidden: int = 64) -> Qwen3ForCausalLM:
    """A Qwen3 of 129,000 parameters (hidden 64), random weights from the current torch seed.

    Three layers: looking a word up takes two (find where it stood before, copy what stood behind it) and one to spare.
    """
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=hidden // 2,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config)


def mini_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer with a chat template, saved and loaded like any other. A token is what spaces separate."""
    chat = "<unk> solve edit question gold answer correct wrong none item".split()
    sql = "SELECT FROM t WHERE id = SUM MAX MIN ( )".split()
    tags = "<answer> </answer> <prompt> </prompt>".split()
    numbers = [str(item) for item in ROWS]
    vocabulary = chat + sql + tags + list(QUESTIONS) + numbers + COLUMNS + WORDS
    ids = {word: i for i, word in enumerate(vocabulary)}
    core = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    turns = "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} <|end|> {% endfor %}"
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="<|end|>",
        additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
        chat_template=turns + "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    )


def save_checkpoint(model, tokenizer, folder: Path) -> None:
    """A folder that `from_pretrained` loads as the same model under transformers 4 and 5, tokenizer included."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    spell_for_old_readers(folder)


def make_base(seed: int, out: Path, hidden: int = 64, patience: float = 1.0) -> float:
    """Warm up and save to `out`; returns the share of words that the solver looks up rightly.

    A base that cannot look words up is none. Then another seed is tried, three in all.
    """
    task, tokenizer = Mini(), mini_tokenizer()
    for each in (seed, seed + 100, seed + 200):
        model = warm_up(task, tokenizer, each, hidden, patience)
        share = lookup(task, LocalModel(model, tokenizer))
        print(f"Seed {each}: with the true glossary as instructions the solver answers {share:.1%} right "
              f"({ENOUGH:.0%} are enough).")
        if share >= ENOUGH:
            break
    save_checkpoint(model, tokenizer, out)
    print(f"Saved in {out}.")
    return share


if __name__ == "__main__":
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--seed", type=int, default=0, help="decides the weights and all that is read")
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--hidden", type=int, default=64, help="width of the model")
    parser.add_argument("--patience", type=float, default=1.0, help="scales the most steps of each lesson")
    args = parser.parse_args()
    make_base(args.seed, args.out, args.hidden, args.patience)
