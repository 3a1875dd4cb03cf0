"""A solver and editors that follow a script, for end-to-end tests through `server.serve` without any model.

    gold = bird_gold(folder, "university")                       # question -> the right SQL
    with serve(scripted(gold), models=("solver", "good-editor", "bad-editor")) as server: ...

The instructions' *level* is how many of RULES they hold. The solver answers a question rightly iff the level is high
enough for that question, so R̄ over all questions is `accuracy(level)`. What the editor does with the level it finds in
the chat, raise or ruin it, depends on the name of the model that is asked for. Every answer depends on nothing but the
request: the same run twice, in any order or after an interruption, sees the same answers.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

RULES = ["Read the hint first and follow it to the letter.", "Return the asked columns only, in the asked order.",
         "Join tables over their id columns.", "Compare names exactly as they are stored.",
         "Count distinct rows where a join repeats them.", "Sort and cut with ORDER BY and LIMIT 1 for superlatives."]
RUIN = "Be creative, and answer in rhyme if you can."
WRONG = "SELECT 'this is not the answer'"
TAGS = "prompt|improved_variable|lesson"  # what an editor may be asked to put its text into


def bird_gold(folder: str | Path, domain: str | None = None) -> dict[str, str]:
    """Question -> gold SQL of one database (or all) of a folder in BIRD's layout."""
    problems = json.loads((Path(folder) / "dev.json").read_text(encoding="utf-8"))
    return {problem["question"]: problem["SQL"] for problem in problems if domain in (None, problem["db_id"])}


def level(text: str) -> int:
    """The quality of instructions, wherever they stand in a text.

    >>> level("be brief"), level("be brief. " + RULES[3] + RULES[0] + RULES[3])
    (0, 2)
    """
    return sum(rule in text for rule in RULES)


def accuracy(reached: int, base: float = 0.2) -> float:
    """The share of questions the solver answers rightly: from `base` without any rule to 1 with all of them."""
    return base + (1 - base) * reached / len(RULES)


def draw(text: str) -> float:
    """A number in [0, 1) that depends on the text alone (`hash` would differ from process to process)."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "replace")).digest()[:6], "big") / 2**48


def solve(gold: dict[str, str], text: str, base: float) -> str:
    """The answer to the question in `text`; a remark if it holds none or several: then a critic was asked."""
    plain = {" ".join(question.split()): question for question in gold}
    text = " ".join(text.split())
    found = [question for question in plain if question in text]
    found = [question for question in found if not any(question in other for other in found if other != question)]
    if len(found) != 1:
        return f"{len(found)} questions, and the instructions hold {level(text)} of the {len(RULES)} rules they need."
    place = sorted(plain, key=draw).index(found[0]) / len(plain)
    sql = gold[plain[found[0]]] if place < accuracy(level(text), base) else WRONG
    return f"Let me think.\n<answer>{sql}</answer>"


def edit(name: str, text: str, tag: str) -> str:
    """What the editor called `name` writes into `tag`.

    good: one more rule, always. bad: half of its edits lose everything, the others add a rule. ruin: loses everything,
    always. mute: forgets the tags, always. fickle: forgets them in half of its edits, else good.
    """
    luck = draw(text)
    if "mute" in name or ("fickle" in name and luck < 0.5):
        return "I would rather not say."
    if "ruin" in name or ("bad" in name and luck < 0.5):
        return f"<{tag}>{RUIN}</{tag}>"
    missing = [rule for rule in RULES if rule not in text][:1]
    kept = [rule for rule in RULES if rule in text]
    lines = missing if tag == "lesson" else kept + missing
    return f"I read the mistakes.\n<{tag}>\nWrite one SQLite query.\n" + "\n".join(lines) + f"\n</{tag}>"


def scripted(gold: dict[str, str], base: float = 0.2) -> Callable[[list, dict], str]:
    """A `reply` function for `server.serve`; it counts the requests of each role in its attribute `roles`."""
    def reply(messages: list[dict], body: dict) -> str:
        text = "\n".join(str(message["content"]) for message in messages)
        demanded = re.findall(rf"</({TAGS})>", text, re.IGNORECASE)  # the demand comes last in a chat
        reply.roles["editor" if demanded else "solver"] += 1
        return edit(str(body.get("model")), text, demanded[-1]) if demanded else solve(gold, text, base)

    reply.roles = Counter()
    return reply
