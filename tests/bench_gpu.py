"""What a real run is made of, measured on one GPU with random weights in the shape of Qwen3-4B: nothing is downloaded.

    python tests/bench_gpu.py                             under 8 minutes on one card of 80 GB; prints tables
    python tests/bench_gpu.py --profile                   at the end, where the time of a decoding step goes
    python tests/bench_gpu.py --states 8                  the whole default step, however long it takes
    python tests/bench_gpu.py --hidden 512 --layers 4     everything small, also on a CPU: about two minutes

Five sections: sampling, reading prompts (prefill), the learner, the optimizer, and one whole `train_step`, with editor
and solver both on the card, in bf16. Prompts have random words and the lengths of ROLLOUT's: 4k of schema and
instructions that all problems share, 16k for an edit. That is as long as BIRD's prompts get; most are shorter. Every
answer runs to its token limit, so that lengths are known; --spread draws lengths, and the longest of a batch decides.

A measurement that runs out of memory, or fails in another way, says so in its row, and the next one goes on. One that
would begin after its section's share of --seconds is left out, and says so too.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.profiler import ProfilerActivity
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

sys.path[:0] = [str(Path(__file__).parents[1])]

import data
import evolve
import train
from lse import LocalModel, MasterAdamW, plain_logprobs, plain_sample, policy_loss
from train import StartState

GB = 1e9
GOAL_SCORE = 6000  # tokens/s, 400 rows behind 4.6k
GOAL_EDIT = 300  # tokens/s, 16 rows behind 16k
GOAL_EDIT_PEAK = 60  # GB
GOAL_OPTIMIZER = 5  # seconds a step
GOAL_STEP = 600  # seconds, the whole default step
DEFAULT_STATES = int(evolve.PRESETS["states"].paper)
# Until when a section may begin a measurement, as a share of --seconds. The whole step has the rest.
SHARES = {"sampling": 0.35, "prefill": 0.4, "learner": 0.6, "optimizer": 0.75, "step": 1.0}


@dataclass
class Sizes:
    """Lengths in tokens, counts, and the shape of the model."""

    hidden: int = 2560
    layers: int = 36
    heads: int = 32
    key_heads: int = 8
    head_size: int = 128
    intermediate: int = 9728
    vocabulary: int = 151_936
    common: int = 4096  # schema and instructions, of which the instructions are `edit`
    question: int = 512
    edit_prompt: int = 16_384
    answer: int = 300  # tokens of the solver's answer, in the whole step
    longest_answer: int = 512  # with --spread, the preset of training
    edit: int = 500  # tokens of an edit, in the whole step
    new: int = 64  # new tokens of a measurement of sampling
    learned: int = 512  # tokens of a response that is learned from
    learner_prompts: tuple[int, ...] = (16_384, 4096, 32_768)
    problems: int = 50  # of a holdout
    k: int = 10


def small_sizes(hidden: int, layers: int) -> Sizes:
    """Another width: all lengths are a sixteenth, heads are of 64."""
    heads = hidden // 64
    return Sizes(
        hidden=hidden,
        layers=layers,
        heads=heads,
        key_heads=max(1, heads // 4),
        head_size=64,
        intermediate=hidden * 19 // 5,
        vocabulary=8192,
        common=256,
        question=32,
        edit_prompt=1024,
        answer=18,
        longest_answer=32,
        edit=32,
        new=16,
        learned=32,
        learner_prompts=(1024, 256, 2048),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Models, prompts, a task
# ---------------------------------------------------------------------------------------------------------------------

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A token is a word, so a text of n words has n tokens, also after it has been written, decoded and read again."""
    special = ["<pad>", "<eos>", "<|user|>", "<|assistant|>"]
    words = special + [f"w{i}" for i in range(vocabulary - len(special))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        extra_special_tokens=special[2:],
        chat_template=TEMPLATE,
    )


def random_qwen3(sizes: Sizes, device: torch.device) -> Qwen3ForCausalLM:
    """Random weights in bf16, made on the device."""
    config = Qwen3Config(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.key_heads,
        head_dim=sizes.head_size,
        max_position_embeddings=40_960,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
    )
    torch.set_default_dtype(torch.bfloat16)
    with device:
        model = Qwen3ForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model.eval()


def words(generator: torch.Generator, n: int, sizes: Sizes) -> str:
    """n random words."""
    numbers = torch.randint(sizes.vocabulary - 4, (n,), generator=generator)
    return " ".join(f"w{number}" for number in numbers.tolist())


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


class Watched(LocalModel):
    """A LocalModel that never sees an end, so that lengths are known, and remembers its batches and its time."""

    def __init__(self, model, tokenizer) -> None:
        super().__init__(model, tokenizer)
        self.eos = []
        self.rows: list[int] = []  # of each batch since the last look
        self.seconds: list[float] = []  # of each call of `sample`
        self.written: list[int] = []  # its tokens

    def sample(self, *args, **kwargs):
        before = self.usage.tokens_written
        started = time.perf_counter()
        out = super().sample(*args, **kwargs)
        self.seconds.append(time.perf_counter() - started)
        self.written.append(self.usage.tokens_written - before)
        return out

    def draw_rows(self, rows, options):
        out = super().draw_rows(rows, options)
        self.rows.append(len(rows))
        return out

    def batches(self) -> str:
        """The batches since the last look, as in "2 x 200" or "3 of 16 to 18"."""
        rows, self.rows = self.rows, []
        if not rows:
            return "–"
        if min(rows) == max(rows):
            return f"{len(rows)} x {rows[0]}"
        return f"{len(rows)} of {min(rows)} to {max(rows)}"


class Stub:
    """A task in figures: prompts as long as BIRD's get, every text an edit, and right is what a coin says."""

    name = "stub"

    def __init__(self, sizes: Sizes, domains: int) -> None:
        self.sizes = sizes
        draw = torch.Generator().manual_seed(0)
        self.schemas = {}
        self.seed_instructions = words(draw, sizes.edit, sizes)
        for i in range(domains):
            self.schemas[f"database{i}"] = words(draw, sizes.common - sizes.edit, sizes)
        # An edit's prompt: the instructions, and k problems that fill the rest.
        self.question = words(draw, sizes.question, sizes)
        self.problem_text = words(draw, (sizes.edit_prompt - sizes.edit) // sizes.k - 20, sizes)

    def domains(self, split: str) -> list[str]:
        return list(self.schemas)

    def problems(self, domain: str) -> list[data.Problem]:
        out = []
        for i in range(self.sizes.problems + 2 * self.sizes.k):
            # Questions differ in length, and at their first word.
            shorter = len(self.question) * (7 + i % 2) // 8
            question = f"w{i} {self.question[:shorter]}"
            out.append(data.Problem(id=str(i), question=question, gold="", domain=domain))
        return out

    def solve_chat(self, instructions: str, problem: data.Problem) -> list[dict[str, str]]:
        return user(f"{self.schemas[problem.domain]} {instructions} {problem.question}")

    def grade(self, problem: data.Problem, response: str) -> data.Grade:
        return data.Grade(hash(response) % 2 == 0, response[-20:])

    def edit_chat(self, instructions: str, summary: list[data.Answer]) -> list[dict[str, str]]:
        text = instructions
        for answer in summary:
            text += f" w{answer.id} {self.problem_text} {answer.answer}"
        return user(text)

    def read_edit(self, text: str) -> str | None:
        return text or "w0"


# ---------------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Found:
    """What one measurement gave."""

    seconds: float = 0.0
    peak: float = 0.0  # GB: of the GPU, else of this process
    value: Any = None
    error: str = ""  # why it gave nothing


@dataclass
class Bench:
    """What all sections share."""

    sizes: Sizes
    device: torch.device
    seconds: float  # the budget
    started: float
    solver: Watched
    editor: Watched
    spread: bool
    rate: dict[str, float] = field(default_factory=dict)  # found so far: how long the whole step will take

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def measure(self, section: str, work: Callable[[], Any], again: bool = False) -> Found:
        """Run it, and with `again` a second time, which counts: the first one makes kernels and room ready."""
        elapsed = time.perf_counter() - self.started
        if elapsed > SHARES[section] * self.seconds:
            return Found(error=f"left out: {elapsed:.0f} s are over")
        found = Found()
        try:
            if again:
                work()
            self.clean()
            self.synchronize()
            begin = time.perf_counter()
            found.value = work()
            self.synchronize()
            found.seconds = time.perf_counter() - begin
            found.peak = self.peak()
        except torch.OutOfMemoryError:
            found.error = "out of memory"
        except Exception as error:  # one row must not cost the others
            traceback.print_exc()
            found.error = f"{type(error).__name__}: {str(error).strip()[:80]}".splitlines()[0]
        return found

    def clean(self) -> None:
        """Give back what the last one held, and begin to watch the peak anew."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        elif sys.platform == "linux":
            Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> float:
        """GB: what torch held on the GPU at most, weights included; on a CPU this process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / GB
        if sys.platform != "linux":
            return float("nan")
        status = Path("/proc/self/status").read_text().splitlines()
        line = next(line for line in status if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / GB


def table(title: str, *heads: str) -> None:
    print(f"\n### {title}\n\n| {' | '.join(heads)} |\n{'|---' * len(heads)}|", flush=True)


def row(*cells: object) -> None:
    print(f"| {' | '.join(str(cell) for cell in cells)} |", flush=True)


def goal(sizes: Sizes, reached: bool, text: str) -> str:
    """Goals are for the real sizes."""
    if sizes.hidden != Sizes.hidden:
        return ""
    return f"{'reached' if reached else 'MISSED'}: {text}"


# ---------------------------------------------------------------------------------------------------------------------
# Sampling, and reading prompts
# ---------------------------------------------------------------------------------------------------------------------


def score_chats(sizes: Sizes) -> list[list[dict[str, str]]]:
    """One edit to score: 50 problems behind a common beginning, of two lengths."""
    draw = torch.Generator().manual_seed(1)
    common = words(draw, sizes.common, sizes)
    chats = []
    for i in range(sizes.problems):
        chats.append(user(f"{common} {words(draw, sizes.question * (7 + i % 2) // 8, sizes)}"))
    return chats


def edit_chats(sizes: Sizes) -> list[list[dict[str, str]]]:
    """Four start states to edit: prompts of four lengths that have nothing in common."""
    draw = torch.Generator().manual_seed(2)
    lengths = [sizes.edit_prompt * (16 - i) // 16 for i in range(4)]
    return [user(words(draw, length, sizes)) for length in lengths]


SOLVER = {"temperature": 0.7, "top_p": 0.8, "top_k": 20}  # as the preset has it
EDITOR = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}  # as training has it


@dataclass
class Work:
    """Something to sample."""

    name: str
    model: Watched
    chats: list
    n: int  # rows for each chat
    options: dict
    goal: int = 0  # tokens/s


def sampling_and_prefill(bench: Bench) -> None:
    sizes = bench.sizes
    scored = score_chats(sizes)
    edited = edit_chats(sizes)
    reading = sizes.common + sizes.question
    problems = f"score an edit: {sizes.problems} problems behind {reading}, {sizes.common} common"
    works = [
        Work(problems, bench.solver, scored, 1, SOLVER),
        Work(f"{problems}, x 8 = {8 * len(scored)} rows", bench.solver, scored, 8, SOLVER, GOAL_SCORE),
        Work(f"edit: 4 prompts of {sizes.edit_prompt} x 4", bench.editor, edited, 4, EDITOR, GOAL_EDIT),
    ]
    table(f"Sampling, {sizes.new} new tokens", "work", "way", "batches", "s", "tokens/s", "ms/step", "peak GB", "goal")
    read = [sample_row(bench, work) for work in works]
    for work in (works[0], works[2]):
        plain_row(bench, work)
    title = "Reading the prompts (the same work with one new token)"
    table(title, "work", "distinct tokens", "s", "tokens/s", "peak GB")
    for work, found in zip(works, read):
        if work.n != 8:
            prefill_row(work, found)


def sample_row(bench: Bench, work: Work) -> Found:
    """Measure and print; returns the measurement of one new token, which is mostly reading."""
    new = bench.sizes.new

    def sample(tokens: int) -> None:
        work.model.sample(work.chats, n=work.n, max_new_tokens=tokens, **work.options)

    first = bench.measure("sampling", lambda: sample(1), again=True)
    work.model.batches()
    found = bench.measure("sampling", lambda: sample(new))
    batches = work.model.batches()
    if found.error or first.error:
        row(work.name, "three levels", batches, found.error or first.error, "", "", "", "")
        return first
    tokens = new * work.n * len(work.chats)
    rate = tokens / found.seconds
    step = 1000 * (found.seconds - first.seconds) / (new - 1)
    words = ""
    if work.goal:
        words = goal(bench.sizes, rate >= work.goal, f"{work.goal} tokens/s")
        bench.rate["score" if work.model is bench.solver else "edit"] = rate
    if work.goal == GOAL_EDIT:
        words += " " + goal(bench.sizes, found.peak < GOAL_EDIT_PEAK, f"peak < {GOAL_EDIT_PEAK} GB")
    row(work.name, "three levels", batches, f"{found.seconds:.2f}", f"**{rate:,.0f}**", f"{step:.1f}",
        f"{found.peak:.1f}", words)  # fmt: skip
    return first


def plain_row(bench: Bench, work: Work) -> None:
    """The same rows by plain `generate`, in one batch."""
    rows = []
    for chat in work.chats:
        rows += [work.model.encode(chat)] * work.n
    options = {"max_new_tokens": bench.sizes.new, "do_sample": True, **work.options}
    model = work.model.model
    found = bench.measure("sampling", lambda: plain_sample(model, rows, [], 0, **options))
    cells = [work.name, "plain `generate`", f"1 x {len(rows)}"]
    if found.error:
        row(*cells, found.error, "", "", "", "")
        return
    rate = bench.sizes.new * len(rows) / found.seconds
    row(*cells, f"{found.seconds:.2f}", f"{rate:,.0f}", "", f"{found.peak:.1f}", "")


def prefill_row(work: Work, found: Found) -> None:
    """What is common to all prompts is counted once."""
    if found.error:
        row(work.name, "", found.error, "", "")
        return
    prompts = [work.model.encode(chat) for chat in work.chats]
    common = 0
    while len({prompt[common] for prompt in prompts}) == 1:
        common += 1
    tokens = common + sum(len(prompt) - common for prompt in prompts)
    row(work.name, f"{tokens:,}", f"{found.seconds:.2f}", f"{tokens / found.seconds:,.0f}", f"{found.peak:.1f}")


# ---------------------------------------------------------------------------------------------------------------------
# The learner
# ---------------------------------------------------------------------------------------------------------------------


def model_flop(model, sizes: Sizes, prompt: int, responses: int) -> float:
    """Of one forward and backward pass over a prompt once and all its responses' tokens: 6 per weight and token, the
    embedding's for responses only, and 12 per attended pair, head dimension and layer. What checkpointing computes
    again is not counted, nor what the naive way does G times.
    """
    embedding = model.get_input_embeddings().weight.numel()
    weights = model.num_parameters() - embedding
    pairs = prompt * prompt / 2 + prompt * responses
    attention = 12 * pairs * sizes.heads * sizes.head_size * sizes.layers
    return 6 * weights * (prompt + responses) + 6 * embedding * responses + attention


def learner(bench: Bench) -> None:
    sizes = bench.sizes
    model = bench.editor.model
    model.activation_checkpointing_enable()
    draw = torch.Generator().manual_seed(3)

    def ids(n: int) -> Tensor:
        return torch.randint(4, sizes.vocabulary, (n,), generator=draw)

    table(f"Learner: one group, G 4 x {sizes.learned} tokens, forward and backward",
          "prompt", "way", "checkpointing", "s", "model TFLOP/s", "peak GB")  # fmt: skip
    for prompt in sizes.learner_prompts:
        group = (ids(prompt), [ids(sizes.learned) for _ in range(4)])
        found = learn_row(bench, group, shared=True, checkpointing=True)
        if prompt == sizes.learner_prompts[0]:
            bench.rate["group seconds"] = found.seconds
            learn_row(bench, group, shared=False, checkpointing=True)
        if prompt == sizes.learner_prompts[1]:
            learn_row(bench, group, shared=True, checkpointing=False)
    model.eval()


def learn_row(bench: Bench, group: tuple, shared: bool, checkpointing: bool) -> Found:
    model = bench.editor.model
    prompt, responses = group
    count = sum(len(response) for response in responses)

    def learn() -> None:
        model.train(checkpointing)  # in eval mode nothing is computed again
        if shared:
            [logps] = bench.editor.group_logprobs([group])
        else:
            logps = plain_logprobs(model, prompt, responses)
        policy_loss(logps, [1.0, -1.0, 0.5, -0.5], count).backward()

    found = bench.measure("learner", learn, again=shared)
    way = "shared prompt" if shared else "naive: prompt G times"
    cells = [len(prompt), way, "yes" if checkpointing else "no"]
    if found.error:
        row(*cells, found.error, "", "")
        return found
    teraflops = model_flop(model, bench.sizes, len(prompt), count) / found.seconds / 1e12
    row(*cells, f"{found.seconds:.2f}", f"{teraflops:,.2f}", f"{found.peak:.1f}")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The optimizer
# ---------------------------------------------------------------------------------------------------------------------


def optimizer(bench: Bench) -> MasterAdamW | None:
    """Returns it for the whole step; None if there is no room, or no time."""
    model = bench.editor.model
    host = MasterAdamW.host_bytes(model)
    free = train.memory_free()
    table("MasterAdamW", "what", "s", "goal")
    print(f"| host memory it says it takes: {host / GB:.1f} GB, of {free / GB:.1f} GB that are left | | |")
    if host > free:
        row("left out: too little host memory", "", "")
        return None
    made = bench.measure("optimizer", lambda: MasterAdamW(model, lr=1e-6))
    row("to make it", made.error or f"{made.seconds:.2f}", "")
    if made.error:
        return None
    found = Found()
    for name in ("first step", "second step", "third step"):
        for param in model.parameters():
            param.grad = torch.randn_like(param)
        found = bench.measure("optimizer", made.value.step)
        words = ""
        if name != "first step" and not found.error:
            words = goal(bench.sizes, found.seconds < GOAL_OPTIMIZER, f"{GOAL_OPTIMIZER} s")
        row(name, found.error or f"{found.seconds:.2f}", words)
    bench.rate["optimizer seconds"] = found.seconds
    return made.value


# ---------------------------------------------------------------------------------------------------------------------
# One whole step of training
# ---------------------------------------------------------------------------------------------------------------------


def step_config(sizes: Sizes, states: int, spread: bool) -> train.Config:
    """The default BIRD run's, with answers and edits as long as they are on average."""
    s = evolve.with_presets(train.Config(task="stub", gradient_checkpointing=True, micro_batch=1), remote=True)
    return replace(
        s,
        states=states,
        holdout=sizes.problems,
        k=sizes.k,
        solver_tokens=sizes.longest_answer if spread else sizes.answer,
        editor_tokens=sizes.edit,
        lr=1e-6,
    )


def expected_seconds(bench: Bench, s: train.Config, states: int) -> float:
    """What a step with so many states should take, by what has been measured."""
    answers = states * (s.k + s.group * s.holdout)
    seconds = answers * bench.sizes.answer / bench.rate.get("score", 1000.0)
    seconds += states * s.group * s.editor_tokens / bench.rate.get("edit", 100.0)
    seconds += states * bench.rate.get("group seconds", 5.0)
    # Rows of one state are fewer than were measured, so slower; and texts are to be made and read.
    return 2 * seconds + bench.rate.get("optimizer seconds", 10.0)


def whole_step(bench: Bench, made: MasterAdamW | None, wanted: int) -> None:
    s = step_config(bench.sizes, wanted or DEFAULT_STATES, bench.spread)
    left = bench.seconds - (time.perf_counter() - bench.started)
    while not wanted and s.states > 1 and expected_seconds(bench, s, s.states) > left:
        s = replace(s, states=s.states // 2)
    title = f"One whole train_step: {s.states} states x {s.group} edits x {s.holdout} problems x {s.samples} answer"
    times = DEFAULT_STATES / s.states
    table(title, "part", "batches", "tokens written", "s", "tokens/s", f"s for {DEFAULT_STATES} states", "goal")
    if made is None:
        row("left out: no optimizer", *[""] * 6)
        return
    task = Stub(bench.sizes, DEFAULT_STATES)
    pool = [StartState(domain, task.seed_instructions, 0.5, 0, 0.5) for domain in task.domains("train")]
    if bench.spread:  # one word in so many ends an answer; the sampler then finds as many among its best
        bench.solver.eos = list(range(1, bench.sizes.vocabulary, bench.sizes.answer))
    for model in (bench.solver, bench.editor):
        model.seconds, model.written, model.rows = [], [], []
    first_rows: list[str] = []
    real_edits = bench.editor.sample

    def sample_edits(*args, **kwargs):  # between the summaries and the scores
        first_rows.append(bench.solver.batches())
        return real_edits(*args, **kwargs)

    bench.editor.sample = sample_edits
    accelerator = train.make_accelerator()

    def step() -> dict:
        line, _ = train.train_step(task, bench.solver, bench.editor, made, pool, s, 0, accelerator)
        return line

    found = bench.measure("step", step)
    bench.editor.sample = real_edits
    if found.error:
        row("the step", bench.solver.batches(), "", found.error, "", "", "")
        return
    parts = [
        ("summaries", first_rows[0], bench.solver.written[0], bench.solver.seconds[0]),
        ("edits", bench.editor.batches(), bench.editor.written[0], bench.editor.seconds[0]),
        ("scores", bench.solver.batches(), bench.solver.written[1], bench.solver.seconds[1]),
    ]
    for name, batches, tokens, seconds in parts:
        cells = [name, batches, f"{tokens:,}", f"{seconds:.1f}", f"{tokens / seconds:,.0f}"]
        row(*cells, f"{seconds * times:.0f}", "")
    learn = found.value["seconds"]["learn"]
    groups = learn - bench.rate["optimizer seconds"]
    row("loss, gradients, optimizer step", "", f"{found.value['tokens']:,} learned", f"{learn:.1f}", "",
        f"{learn + groups * (times - 1):.0f}", "")  # fmt: skip
    total = found.seconds + (found.seconds - bench.rate["optimizer seconds"]) * (times - 1)
    row(f"**the step**, peak {found.peak:.1f} GB", "", "", f"{found.seconds:.1f}", "", f"**{total:.0f}**",
        goal(bench.sizes, total < GOAL_STEP, f"{GOAL_STEP} s"))  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Where a decoding step's time goes
# ---------------------------------------------------------------------------------------------------------------------


def profile(bench: Bench) -> None:
    """The 15 operations that take most in the decoding steps of 400 rows: of the GPU's time, and of the CPU's."""
    activities = [ProfilerActivity.CPU]
    orders = ["self_cpu_time_total"]
    if bench.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
        orders.insert(0, "self_cuda_time_total")
    watched = torch.profiler.profile(activities=activities)
    steps = 0

    def count(module, args, kwargs) -> None:
        """Reading prompts is no decoding step; the first step makes kernels ready."""
        nonlocal steps
        ids = kwargs.get("input_ids")  # as `generate` passes them
        if ids is not None and ids.shape[1] == 1:
            steps += 1
            if steps == 2:
                bench.synchronize()
                watched.start()

    bench.solver.eos = []
    chats = score_chats(bench.sizes)
    hook = bench.solver.model.register_forward_pre_hook(count, with_kwargs=True)
    bench.solver.sample(chats, n=8, max_new_tokens=8, **SOLVER)
    bench.synchronize()
    watched.stop()
    hook.remove()
    print(f"\n### Profile: {steps - 1} decoding steps, batches {bench.solver.batches()}, their texts' making included")
    for order in orders:
        text = watched.key_averages().table(sort_by=order, row_limit=15, max_name_column_width=60)
        print(f"\nBy {order}:\n\n```\n{text}\n```", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=2560, help="another width makes everything small")
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--seconds", type=float, default=0, help="after that nothing new begins; 0: 480, small 180")
    parser.add_argument("--states", type=int, default=0, help="of the whole step; 0: what fits in the time, up to 8")
    parser.add_argument("--spread", action="store_true", help="answers of the step end at random, after 300 on average")
    parser.add_argument("--profile", action="store_true", help="show where a decoding step's time goes")
    args = parser.parse_args()
    started = time.perf_counter()
    gpu = torch.cuda.is_available()
    if args.hidden == 2560 and not gpu:
        raise SystemExit("No GPU here: --hidden 512 --layers 4 shows that everything works.")
    sizes, seconds = Sizes(layers=args.layers), 480.0
    if args.hidden != 2560:
        sizes, seconds = small_sizes(args.hidden, args.layers), 180.0
    device = torch.device("cuda:0" if gpu else "cpu")
    torch.manual_seed(0)
    tokenizer = word_tokenizer(sizes.vocabulary)
    solver = Watched(random_qwen3(sizes, device), tokenizer)
    editor = Watched(random_qwen3(sizes, device), tokenizer)
    bench = Bench(sizes, device, args.seconds or seconds, started, solver, editor, args.spread)

    card = "CPU"
    if gpu:
        card = f"{torch.cuda.get_device_name(0)}, {torch.cuda.get_device_properties(0).total_memory / GB:.0f} GB"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    weights = solver.model.num_parameters()
    print(f"**{card}**, {torch.get_num_threads()} threads; {versions}")
    print(f"\nEditor and solver: Qwen3, {sizes.layers} layers of {sizes.hidden}, {weights / 1e6:,.0f} million random "
          f"weights each, bf16, made after {time.perf_counter() - started:.0f} s.")  # fmt: skip

    sampling_and_prefill(bench)
    learner(bench)
    made = optimizer(bench)
    whole_step(bench, made, args.states)
    if args.profile:
        profile(bench)
    print(f"\nIn all {time.perf_counter() - started:.0f} s.")


if __name__ == "__main__":
    main()
