"""The tasks: problems, prompts and graders.

What a task is: any object with the seven members below. Nothing here knows about models, rewards or trees (that is
`lse.py`), so this file can be copied away alone.

    name                                   a short word for folders and logs
    seed_instructions                      the editable field before the first edit (the paper's c_0)
    domains(split)                         names of the domains: split is "train", "test" or "all"
    problems(domain)                       its problems, all of one database / subject
    solve_chat(instructions, problem)      the chat the frozen solver answers             (x under context c)
    grade(problem, response) -> Grade      right or wrong, and why                        (R(x, y))
    edit_chat(instructions, summary)       the chat the editor answers with new instructions  ((c, S) -> c')
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One question of one domain. `gold` is the right answer as the grader reads it (SQL, a letter, a string)."""

    id: str
    question: str
    gold: str
    domain: str = ""
    split: str = ""  # "pool", "holdout" or "test" where the task prescribes it; "" lets evolve.py draw the splits
    evidence: str = ""  # BIRD's hint, shown before the question
    choices: tuple[str, ...] = ()  # multiple choice: the options, in order


@dataclass(frozen=True)
class Grade:
    """A verdict: is it right, what the grader took as the answer, and one line for the editor on what went wrong."""

    correct: bool
    answer: str
    feedback: str = ""


@dataclass(frozen=True)
class Answer:
    """One graded answer, flat and JSON-ready: an element (x, y, y*, r) of the paper's summary S."""

    id: str
    question: str
    response: str  # the solver's full text
    answer: str  # what the grader extracted from it
    gold: str
    correct: bool
    feedback: str = ""
    truncated: bool = False


def extract_tag(text: str, tag: str) -> str | None:
    """The content of the last closed, innermost `<tag>...</tag>`, stripped; None if there is none.

    Tag names match in any case. An unclosed tag counts for nothing: a response cut off at the token limit is invalid.

    >>> extract_tag("<think> <answer>A</answer>? </think> <ANSWER> B </ANSWER>", "answer")
    'B'
    >>> extract_tag("<answer> never closed", "answer") is None
    True
    """
    name = re.escape(tag)
    pairs = re.findall(rf"<{name}>((?:(?!</?{name}>).)*)</{name}>", text, re.DOTALL | re.IGNORECASE)
    return pairs[-1].strip() if pairs else None


# ---------------------------------------------------------------------------------------------------------------------
# The miniature: databases with a hidden glossary
# ---------------------------------------------------------------------------------------------------------------------

# ---------------------------------------------------------------------------------------------------------------------
# Text-to-SQL: BIRD and everything in its format
# ---------------------------------------------------------------------------------------------------------------------


def cut(text: str, limit: int) -> str:
    """`text` if it has at most `limit` characters, else its head and tail around a note that says so, `limit` in all.

    >>> cut("SELECT " + "x, " * 40 + "y FROM t", 60)
    'SELECT x, x, x, x,[... cut from 135 characters ...] y FROM t'
    """
    text = text.encode("utf-8", "replace").decode()  # a lone surrogate would stop the tokenizer
    note = f"[... cut from {len(text)} characters ...]"
    keep = max(0, limit - len(note))
    return text if len(text) <= limit else (text[: keep - keep // 3] + note + text[len(text) - keep // 3 :])[:limit]


def edit_messages(
    role: str, instructions: str, summary: list[Answer], budget: int = 1500, reasoning: bool = False
) -> list[dict]:
    """The editor's chat, shared by every task: f_psi reads (c, S) and writes c'. One user message and no system
    message, because some chat templates refuse one.

    `role` ends "You improve the instructions of ..." and says what the solver does. Each field of a problem is cut to
    `budget` characters and the old instructions to four times that: k problems take about (4 + 5k) * budget characters
    at most. `reasoning` adds the solver's full text.

    >>> chat = edit_messages("a solver", "Add.", [Answer("1", "1+1?", "<answer>3</answer>", "3", "2", False)])
    >>> print(chat[0]["content"][:40])
    You improve the instructions of a solver
    """
    problems = []
    for i, a in enumerate(summary, 1):
        verdict = "right" if a.correct else "WRONG, cut off at the token limit" if a.truncated else "WRONG"
        fields = {"Question": a.question, "Full response": a.response if reasoning else "",
                  "Model's answer": a.answer or "(none)", "Right answer": a.gold, "Verdict": verdict,
                  "Feedback": a.feedback}  # fmt: skip
        problems.append(f"## Problem {i}\n" + "\n".join(f"{k}: {cut(v, budget)}" for k, v in fields.items() if v))
    content = f"""You improve the instructions of {role}. The model itself never changes; its instructions do.

# Current instructions
{cut(instructions, 4 * budget)}

# What the model did under them: {sum(a.correct for a in summary)} of {len(summary)} right
{chr(10).join(problems)}

# Your task
Work out why the wrong answers are wrong and what the right ones got right. Then write the full new instructions: they
replace the old ones and will be judged on other questions of the same domain. Keep what works, add the rules and facts
of this domain that these problems reveal, name likely mistakes, and do not merely repeat the questions above.
Write them between <prompt> and </prompt>; only what stands between the tags counts."""
    return [{"role": "user", "content": content}]


# ---------------------------------------------------------------------------------------------------------------------
# Multiple choice: MMLU-Redux, SuperGPQA, MMLU-Pro
# ---------------------------------------------------------------------------------------------------------------------

# ---------------------------------------------------------------------------------------------------------------------
# Your own problems: a JSONL file
# ---------------------------------------------------------------------------------------------------------------------

# ---------------------------------------------------------------------------------------------------------------------
# Finding a task by its name
# ---------------------------------------------------------------------------------------------------------------------
