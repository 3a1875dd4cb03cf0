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

# ---------------------------------------------------------------------------------------------------------------------
# Multiple choice: MMLU-Redux, SuperGPQA, MMLU-Pro
# ---------------------------------------------------------------------------------------------------------------------

# ---------------------------------------------------------------------------------------------------------------------
# Your own problems: a JSONL file
# ---------------------------------------------------------------------------------------------------------------------

# ---------------------------------------------------------------------------------------------------------------------
# Finding a task by its name
# ---------------------------------------------------------------------------------------------------------------------
