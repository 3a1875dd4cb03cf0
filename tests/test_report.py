"""The report page and the tree as text: complete, self-contained, and deaf to what a model writes into them."""

from __future__ import annotations

import random
import re
import xml.etree.ElementTree as ET
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import pytest

import evolve as report

SVG_ONLY = {"path", "line", "circle"}  # may close themselves in HTML, as the void elements may
VOID = {"meta", "br"}


@dataclass
class Node:
    id: int
    parent: int | None
    instructions: str
    score: float | None
    scores: list[float] | None = None
    visits: int = 0
    summary: list[dict] = field(default_factory=list)
    note: str = ""


@dataclass
class Tree:
    nodes: list[Node]

    def best(self) -> Node:
        return max((node for node in self.nodes if node.score is not None), key=lambda node: (node.score, -node.id))


def answer(text: str = "SELECT 1", correct: bool = True) -> dict:
    return {"id": "p", "question": "Q " + text, "response": "R " + text, "answer": "A " + text, "gold": "G " + text,
            "correct": correct, "feedback": "F " + text, "truncated": False}


def tree(parents: list[int], scores: list[float | None], text: str = "do {} well") -> Tree:
    """Node i + 1 hangs on parents[i]; every node has its own score, instructions and one graded problem."""
    return Tree([Node(i, None if i == 0 else parents[i - 1], text.replace("{}", str(i)), score, None, i,
                      [answer(text.replace("{}", f"s{i}"), bool(i % 2))], text if score is None else "")
                 for i, score in enumerate(scores)])


def random_tree(rng: random.Random, size: int) -> Tree:
    return tree([rng.randrange(i) for i in range(1, size)],
                [0.5] + [rng.choice([None, *(k / 8 for k in range(9))]) for _ in range(size - 1)])


def page(path: Path, runs: dict[str, Tree], **options) -> tuple[str, ET.Element]:
    """The page as text and as parsed XML."""
    report.write_report(path / "report.html", runs, **options)
    text = (path / "report.html").read_text(encoding="utf-8")
    return text, ET.fromstring(text)


def text_of(element: ET.Element) -> str:
    return "".join(element.itertext())


# -- the tree as text -------------------------------------------------------------------------------------------------

STEPS = tree([0, 1, 2, 2, 3, 2, 4, 6], [0.25, 0.5, 0.625, 0.125, 0.5, None, 0.75, 0.375, 0.75])
STEPS.nodes[5].note = "no <prompt> tags\nin the answer\x1b[31m"

def test_tree_text_of_a_hand_made_tree() -> None:
    """2 has the children 3, 4, 6: 3 and 4 branch off, 6 goes on in its column; 5 hangs on 3 and 7 on 4, beside."""
    assert report.tree_text(STEPS) == """\
*       0  0.250  visits 0
*       1  0.500  visits 1
*       2  0.625  visits 2
├─o     3  0.125  visits 3
├─┼─o   4  0.500  visits 4
│ x │   5  invalid: no <prompt> tags in the answer�[31m  visits 5
*   │   6  0.750  visits 6
│   o   7  0.375  visits 7
o       8  0.750  visits 8"""


def test_tree_text_of_the_seed_alone() -> None:
    assert report.tree_text(tree([], [0.5])) == "*   0  0.500  visits 0"


def parents_from_text(drawn: str) -> list[int | None]:
    """Read the tree back from its drawing: a branch leaves the column of its ├, else it goes on in its own column."""
    owner: dict[int, int] = {}  # column -> the nearest node above
    found: list[int | None] = []
    for number, line in enumerate(drawn.splitlines()):
        graph = re.match(r"[ │├┼─*ox]*", line)[0]
        column = re.search(r"[*ox]", graph).start()
        source = graph.find("├") if "├" in graph else column
        found.append(owner.get(source) if number else None)
        assert number == 0 or source in owner
        owner[column] = number
        for other in list(owner):  # a column ends where nothing is drawn in it
            if graph[other] == " ":
                del owner[other]
    return found


def test_the_drawing_determines_the_tree() -> None:
    rng = random.Random(0)
    for _ in range(300):
        drawn = random_tree(rng, rng.randrange(1, 30))
        text = report.tree_text(drawn)
        assert parents_from_text(text) == [node.parent for node in drawn.nodes]
        best, way = drawn.best(), set()
        while best is not None:
            way.add(best.id)
            best = None if best.parent is None else drawn.nodes[best.parent]
        assert {i for i, line in enumerate(text.splitlines()) if "*" in line} == way


# -- the page ---------------------------------------------------------------------------------------------------------


class Balance(HTMLParser):
    """Checks, as an HTML parser sees the page, that every element is closed, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        assert tag in VOID | SVG_ONLY, f"<{tag}/> stays open in HTML"

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check_closed(text: str) -> None:
    """Nothing is loaded, nothing runs: only known elements, only inner links, and a policy that forbids the rest."""
    root = ET.fromstring(text)
    harmless = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "div", "table", "tr", "th", "td",
                "p", "figure", "figcaption", "span", "a", "i", "b", "br", "pre", "ins", "del", "details", "summary",
                "svg", "text", "tspan", *SVG_ONLY}
    assert {element.tag for element in root.iter()} <= harmless
    for element in root.iter():
        for name, value in element.attrib.items():
            assert not name.startswith("on") and name not in ("src", "srcset", "data", "action", "background")
            assert name != "href" or value.startswith("#")
            assert not re.search(r"url\(|https?:|//|javascript", value)
    style = root.find("head/style").text
    assert not re.search(r"url\(|@import|https?:|<|&|src", style)
    assert "default-src 'none'" in text
    parser = Balance()
    parser.feed(text)
    assert parser.open == []


def test_the_page_is_whole_and_alone(tmp_path: Path) -> None:
    rng = random.Random(1)
    runs = {"ucb": random_tree(rng, 25), "best": random_tree(rng, 9), "chain": tree([], [0.5])}
    text, root = page(tmp_path, runs, title="bird / video_games")
    check_closed(text)
    assert list(tmp_path.iterdir()) == [tmp_path / "report.html"]
    assert root.find("body/h1").text == "bird / video_games" == root.find("head/title").text


def test_every_node_is_there_once_and_its_link_leads_to_it(tmp_path: Path) -> None:
    rng = random.Random(2)
    runs = {"ucb": random_tree(rng, 25), "pareto": random_tree(rng, 12)}
    _, root = page(tmp_path, runs)
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    links = [element.get("href") for element in root.findall(".//svg/a")]
    expected = [f"t{k}-{node.id}" for k, tree in enumerate(runs.values()) for node in tree.nodes]
    assert sorted(ids) == sorted([*expected, "t0", "t1"])
    assert links == ["#" + name for name in expected]
    for k, run in enumerate(runs.values()):
        for node in run.nodes:
            details = text_of(root.find(f".//div[@id='t{k}-{node.id}']"))
            assert f"do {node.id} well" in details and f"Q do s{node.id} well" in details
            assert f"{int(node.id % 2)} of 1 problems right" in details


def test_scores_changes_and_the_best_node(tmp_path: Path) -> None:
    """Numbers stand beside every colour; invalid edits have a cross and no colour; the way to the best is thick."""
    _, root = page(tmp_path, {"ucb": STEPS})
    figure = root.find(".//figure/svg")
    rows = [text_of(link) for link in figure.findall("a")]
    assert rows == ["#00.250", "#10.500+0.250", "#20.625+0.125", "#30.125-0.500", "#40.500-0.125", "#5invalid",
                    "#60.750+0.125 ★ best", "#70.375-0.125", "#80.750"]
    assert [link.find("circle") is None for link in figure.findall("a")] == [i == 5 for i in range(9)]
    assert [path.get("class") for path in figure.findall("path")].count("way") == 3  # 0-1, 1-2, 2-6
    assert len(figure.findall("path")) == 8
    classes = [t.get("class") for t in figure.iter("tspan") if t.get("class") in ("up", "down")]
    assert classes == ["up", "up", "down", "down", "up", "down"]
    fills = [circle.get("fill") for circle in figure.iter("circle")]
    assert fills[3] == "#00205a" and fills[5] == fills[-1] == "#ffea46"  # 0.125, the lowest; 0.75, the highest
    summary = [text_of(cell) for cell in root.findall(".//table/tr")[1]]
    assert [cell.strip() for cell in summary] == ["ucb", "0.250", "0.750", "+0.500", "1 of 8"]
    summaries = [text_of(details.find("summary")) for details in root.findall(".//div[@class='cols']/div/details")]
    assert summaries[0].strip() == "#0 seed · 0.250  · visits 0"
    assert summaries[5].strip() == "✗ #5 from #3 · invalid  · visits 5"
    assert summaries[6].strip() == "#6 from #2 · 0.750 +0.125 ★ best · visits 6"
    assert "Invalid edit: no <prompt> tags" in text_of(root.find(".//div[@id='t0-5']"))


def test_the_chart_holds_every_round(tmp_path: Path) -> None:
    """The line is the best so far, the dots the rounds' own scores; both on one scale, higher is further up."""
    _, root = page(tmp_path, {"ucb": STEPS})
    chart = next(svg for svg in root.iter("svg") if svg.get("aria-label") == "score over the rounds")
    dots = {i: float(dot.get("cy")) for i, dot in zip([0, 1, 2, 3, 4, 6, 7, 8], chart.findall("circle"))}
    assert len(chart.findall("circle")) == 8, "the invalid edit has no dot"
    height = dict(zip((node.score for node in STEPS.nodes), (dots.get(i) for i in range(9))))
    assert height[0.75] < height[0.625] < height[0.5] < height[0.25] < height[0.125]
    assert height[0.25] - height[0.5] == pytest.approx(height[0.5] - height[0.75], abs=0.11)
    line = chart.find("path").get("d")
    levels = [float(level) for level in re.findall(r"V([\d.]+)", line)]
    assert levels == [height[s] for s in (0.25, 0.5, 0.625, 0.625, 0.625, 0.625, 0.75, 0.75, 0.75)]


def test_what_an_edit_changed_is_shown(tmp_path: Path) -> None:
    old, new = "Keep me.\nUse the old column.\nDrop this line.", "Keep me.\nUse the new column.\nAnd something else!"
    steps = Tree([Node(0, None, old, 0.5), Node(1, 0, new, 0.75)])
    _, root = page(tmp_path, {"ucb": steps})
    shown = root.find(".//div[@id='t0-1']/pre")
    assert next(shown.iter("del")).text == "old" and next(shown.iter("ins")).text == "new"
    assert text_of(shown).startswith("Keep me.\nUse the oldnew column.\n")
    without = {tag: "".join(shown.text or "" if e is shown else (e.text if e.tag != tag else "") + (e.tail or "")
                            for e in shown.iter()) for tag in ("del", "ins")}
    assert without == {"del": new + "\n", "ins": old + "\n"}, "leaving one kind out gives the other version"


def test_diff_loses_nothing() -> None:
    rng = random.Random(3)
    for _ in range(200):
        old, new = ("".join(rng.choice("ab <&\n") for _ in range(rng.randrange(60))) for _ in range(2))
        shown = report.diff(old.splitlines(True), new.splitlines(True))
        for text, other in ((new, "del"), (old, "ins")):
            kept = re.sub(f"<{other}>.*?</{other}>", "", shown, flags=re.DOTALL)
            kept = re.sub("</?(ins|del)>", "", kept)
            assert kept == report.esc(text)


def test_a_long_line_is_not_compared_word_by_word() -> None:
    """difflib is quadratic in repetitive text: 10,000 words of a model caught in a loop took it 18 seconds."""
    for words in (100, 10_000):
        old = " ".join(f"word{i}" for i in range(words))
        shown = report.diff([old], [old.replace("word7 ", "square ")])
        assert ("<ins>square</ins>" in shown) == (words == 100) and "square" in shown


# -- hostile text -----------------------------------------------------------------------------------------------------

HOSTILE = [
    "<script>alert({})</script>", "</details></div></body>{}", "]]>{}<!--", "--><img src='//evil/{}' onerror='x()'>",
    "&lt;b&gt;{} &amp; &bogus; &#x41;", "\x00{}\x01\x08\x0b\x1f\x7f\x85", "\ud800{}\udfff", "\ufffe{}\uffff",
    "{}\r\n\r", "\u202e{}\u2066 مرحبا 🦉 \U0010ffff", "\" onload=\"x({})", "' style='background:url(http://evil/{})",
    "</style>{}<b>", "</title>{}", "{}" + "x" * 10_000, "xy{}" + "&" * 5_000, "",
]


def hostile_runs(text: str) -> dict[str, Tree]:
    steps = tree([0, 0, 1], [0.5, 0.25, None, 0.75], text)
    steps.nodes[1].instructions = "a\n" + text + "\nb"
    return {text + " one": steps, "two": tree([0], [0.5, 1.0], text)}


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_text(text: str, tmp_path: Path) -> None:
    written, root = page(tmp_path, hostile_runs(text), title=text)
    check_closed(written)
    visible = report.clean(text).replace("\r", "\n")
    if visible.strip():
        assert visible == (root.find("head/title").text or "")
        shown = text_of(root.find(".//div[@id='t0-3']"))
        assert shown.count(visible.replace("{}", "3")[:4000]) >= 1, "the instructions are shown as they are"
        for what in "QRAGF":
            assert (what + " " + visible.replace("{}", "s3"))[:4000] in shown
    drawn = report.tree_text(next(iter(hostile_runs(text).values())))
    assert re.fullmatch(r"[ -~\n\xa0-\U0010ffff]*", drawn.encode().decode()), "the terminal gets no control characters"
    assert len(drawn.splitlines()) == 4


@pytest.mark.parametrize("broken", ["html.escape", "clean", "esc"])
def test_the_hostile_test_can_fail(broken: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Take one layer of the escaping away: at least one hostile text must then break the page."""
    if broken == "html.escape":
        monkeypatch.setattr(report.html, "escape", lambda text: text)
    else:
        monkeypatch.setattr(report, broken, str)
    failures = 0
    for i, text in enumerate(HOSTILE):
        (tmp_path / str(i)).mkdir()
        try:
            check_closed(page(tmp_path / str(i), hostile_runs(text), title=text)[0])
        except (AssertionError, ET.ParseError, UnicodeEncodeError):
            failures += 1
    assert failures >= (3 if broken == "clean" else 5)


@pytest.mark.parametrize("place", ["title", "label", "instructions", "note", "question", "response", "answer", "gold",
                                   "feedback"])
def test_every_place_is_escaped(place: str, tmp_path: Path) -> None:
    """The same attack through each field alone, so that no single forgotten escape hides behind the others."""
    attack = "<script>x</script></pre></details>\x00\ud800&"
    steps = tree([0, 0], [0.5, 0.75, None])
    if place in ("instructions", "note"):
        for node in steps.nodes:
            setattr(node, place, attack + str(node.id))
    elif place not in ("title", "label"):
        steps.nodes[1].summary[0][place] = attack
    written, _ = page(tmp_path, {attack if place == "label" else "ucb": steps},
                      title=attack if place == "title" else "report")
    check_closed(written)
    assert "&lt;script&gt;" in written
