"""Reports: charts worked by hand, nothing foreign becomes an element, the page of three tiny runs, and the command."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from conftest import tiny_settings

from smalllm import cli
from smalllm.data.prepare import prepare
from smalllm.reporting import chart, markdown
from smalllm.reporting.dossier import RunFacts, gather, read_samples
from smalllm.reporting.html import page
from smalllm.reporting.markup import Markup, element, joined
from smalllm.reporting.wording import card_rows, shown
from smalllm.training.trainer import train

HOSTILE = [
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "</p></style><style>*{display:none}</style>",
    "\"'><svg onload=alert(1)>", "[x](javascript:alert(1))", "|a|b|\n\n# heading", "```\n<b>out</b>\n```", "&lt;b&gt;", "\u202eevil\x1b[2J",
]  # fmt: skip


@pytest.fixture(scope="module")
def dataset_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stories of the built-in world, with more validation documents than a comparison needs at least."""
    folder = tmp_path_factory.mktemp("data") / "stories"
    prepare(["storyworld:300"], folder, vocab_size=512, seed=1, valid_fraction=0.1)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, dataset_folder: Path) -> list[str]:
    """Three runs: two seeds of one setting and one of another."""
    folder = tmp_path_factory.mktemp("runs")
    for name, seed, lr in (("slow-1", 1, 1e-3), ("slow-2", 2, 1e-3), ("fast", 1, 3e-3)):
        settings = tiny_settings(dataset_folder, optim={"lr": lr}).model_copy(update={"seed": seed, "name": name})
        train(settings, folder / name)
    return [str(folder / name) for name in ("slow-1", "slow-2", "fast")]


class Elements(HTMLParser):
    """Start tags with their attributes, and the text of everything."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


# ── markup ──


@pytest.mark.parametrize("hostile", HOSTILE)
def test_foreign_text_stays_text(hostile: str) -> None:
    written = element("p", hostile, title=hostile)
    assert [tag for tag, _ in Elements(written).tags] == ["p"]
    assert joined([hostile]).count("<") == 0
    assert Markup(written) in element("div", written)  # what is made here is not escaped twice


def test_elements_without_content_close_themselves() -> None:
    assert element("line", x1=1.0, x2=2.125, class_="grid", y1=None) == '<line x1="1" x2="2.12" class="grid"/>'
    assert element("p") == "<p></p>"


# ── charts ──


def test_places_are_worked_by_hand() -> None:
    scale = chart.Scale(0.0, 10.0, 100.0, 200.0)
    assert [scale(value) for value in (0, 5, 10)] == [100, 150, 200]
    powers = chart.Scale(1.0, 100.0, 0.0, 2.0, logarithmic=True)
    assert [powers(value) for value in (1, 10, 100)] == pytest.approx([0, 1, 2])


def test_ticks_are_round_few_and_inside() -> None:
    for low, high in itertools.product((-3.7, 0.0, 0.113, 80.0), (0.2, 1.0, 7.3, 12345.0)):
        found = chart.ticks(low, low + high, 6)
        assert 1 <= len(found) <= 6 and all(low - 1e-9 <= tick <= low + high + 1e-9 for tick in found)


def test_a_chart_is_svg_with_its_curve_and_floor() -> None:
    lines = [chart.Line("a <b>", 0, [1, 2, 3], [3.0, 2.0, 1.0], marked=True), chart.Line("empty", 1, [], [])]
    drawing = ElementTree.fromstring(chart.curves("Loss & co", lines, "step", floor=0.5))
    texts = [found.text for found in drawing.iter("text")]
    assert drawing.find("figcaption").text == "Loss & co" and "floor 0.500" in texts and "step" in texts  # type: ignore[union-attr]
    assert len(list(drawing.iter("polyline"))) == 1 and len(list(drawing.iter("circle"))) == 3
    assert next(drawing.iter("title")).text == "a <b>: 3.0000 at 1"
    assert chart.curves("none", [chart.Line("a", 0, [], [])], "step") == ""


@pytest.mark.parametrize("logarithmic", [False, True])
@pytest.mark.parametrize("values", [[0.0, 0.0], [1.0], [5.0, 5.0, 5.0], [1e-9, 1e9], [-1.0, 2.0], [1.0, float("inf")]])
def test_odd_values_are_drawn(values: list[float], logarithmic: bool) -> None:
    finite = [value for value in values if value != float("inf")]
    steps = list(range(len(finite)))
    assert "nan" not in chart.curves(
        "t", [chart.Line("a", 0, steps, finite, noisy=True)], "step", logarithmic=logarithmic
    )


def test_an_interval_is_drawn_where_it_lies() -> None:
    drawing = ElementTree.fromstring(chart.whisker(2.0, (1.0, 3.0), (0.0, 4.0), 2, floor=0.0))
    line = [found for found in drawing.iter("line") if "whisker" in found.attrib["class"]][0]
    assert (float(line.attrib["x1"]), float(line.attrib["x2"])) == (6 + 148 / 4, 6 + 3 * 148 / 4)


# ── words ──


def test_scorecards_of_any_shape_become_lines() -> None:
    cards = [
        {
            "count": 2,
            "ended": 0.5,
            "intervals": {"ended": (0.1, 0.9)},
            "violations": {"names": 3},
            "data": {"ended": 1.0},
        },
        {"count": 2, "ended": 1.0, "odd": ["a", 1], "violations": {}},
    ]
    found = list(card_rows(cards))
    assert [row.name for row in found] == ["count", "ended", "violations", "names", "odd"]
    assert found[1].values == (0.5, 1.0) and found[1].intervals == ("0.100 to 0.900", "") and found[1].data == 1.0
    assert found[2].values == () and found[3].inner and found[3].values == (3, None)
    assert [shown(value) for value in (None, True, 1234, 0.12345, 512.34, ["a", 2], {})] == [
        "–",
        "yes",
        "1,234",
        "0.123",
        "512.3",
        "a, 2",
        "none",
    ]


@pytest.mark.parametrize("hostile", HOSTILE)
def test_markdown_keeps_foreign_text_in_its_place(hostile: str) -> None:
    row = markdown.table(("a", "b"), [[markdown.code(hostile), markdown.words(hostile)]]).splitlines()
    assert len(row) == 3 and len(re.findall(r"(?<!\\)\|", row[2])) == 3
    block = markdown.fenced(hostile)
    fence = block.split("text", 1)[0]
    assert block.count(fence) == 2 and block.endswith(fence)
    assert not re.search(r"(?<!\\)[<\[]", markdown.words(hostile))


# ── the report ──


@pytest.fixture(scope="module")
def whole(runs: list[str]) -> str:
    return page(gather(runs, limit=12, stories=2))


def test_the_page_of_three_runs_tells_everything(whole: str) -> None:
    text = Elements(whole).text
    for words in (
        "slow and fast", "3 runs. They differ in optim.lr, seed.", "Is the difference real?", "12 documents", "above the floor",
        "Training loss", "Learning rate", "Speed", "slow (2 seeds)", "repeated 4grams", "the data", "step 12", "Once upon a time",
        "optim.lr", "data fingerprint", "smalllm train",
    ):  # fmt: skip
        assert words in text, words
    tags = [tag for tag, _ in Elements(whole).tags]
    assert tags.count("figure") == 4 and tags.count("h2") == 8


def test_the_page_needs_nothing_and_runs_nothing(whole: str) -> None:
    tags = Elements(whole).tags
    assert not {tag for tag, _ in tags} & {"script", "link", "img", "iframe", "object", "a", "base", "form"}
    names = {name for _, attributes in tags for name in attributes}
    assert not [name for name in names if name.startswith("on") or name in ("src", "href", "style", "xlink:href")]
    assert "http://" not in whole and "https://" not in whole and "url(" not in whole
    style = whole.partition("<style>")[2].partition("</style>")[0]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = next(a["content"] for tag, a in tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"


def test_differing_settings_are_marked(whole: str) -> None:
    marked = re.findall(r'<tr class="differs"><th><code>([\w.]+)', whole)
    assert marked == ["name", "seed", "optim.lr"]


def test_the_same_runs_give_the_same_page(runs: list[str], whole: str) -> None:
    assert page(gather(runs, limit=12, stories=2)) == whole


def test_hostile_runs_stay_text(runs: list[str], tmp_path: Path) -> None:
    """Names, prompts, stories, settings and environment that try to be HTML; broken lines are passed over."""
    folder = tmp_path / "<img src=x onerror=alert(1)> & 'co' `x`"
    shutil.copytree(runs[0], folder)
    lines = [json.dumps({"step": step, "prompt": text, "text": text}) for step, text in enumerate(HOSTILE)]
    odd = ["{", '{"step": 3}', '{"step": "x"}', '{"step": 1, "prompt": 5, "text": []}', "[]"]
    (folder / "samples.jsonl").write_text("\n".join(lines + odd), encoding="utf-8")
    (folder / "environment.json").write_text(json.dumps(dict(zip(HOSTILE, HOSTILE, strict=True))), encoding="utf-8")
    (folder / "metrics.jsonl").write_text(
        '{"step": 1, "train_loss": "<b>", "tokens": {"a": 1}}\n{"step": 2, "train_loss": 3.5}\n', encoding="utf-8"
    )
    dossier = gather([str(folder)], limit=12, stories=0)
    assert len(dossier.runs[0].samples) == len(HOSTILE)
    written, tame = page(dossier), page(gather([runs[0]], limit=12, stories=0))
    assert {tag for tag, _ in Elements(written).tags} <= {tag for tag, _ in Elements(tame).tags} | {"ul", "li"}
    assert "\x1b" not in written and "\u202e" not in written
    assert "<script>alert(1)</script>" in "".join(Elements(written).words)  # it can be read, and does nothing
    told = markdown.text(dossier)
    assert "\x1b" not in told and re.search(r"^<", told, re.MULTILINE) is None or "```" in told


def test_a_run_that_just_began_has_a_page(runs: list[str], tmp_path: Path) -> None:
    shutil.copytree(runs[0], tmp_path / "young")
    for name in ("metrics.jsonl", "samples.jsonl", "environment.json"):
        (tmp_path / "young" / name).unlink()
    dossier = gather([str(tmp_path / "young")], limit=12, stories=0)
    assert "Curves" not in page(dossier) and "Settings" in page(dossier) and "## Settings" in markdown.text(dossier)
    assert read_samples(dossier.runs[0].entrant.folder) == []


def test_runs_of_one_setting_are_shown_and_not_compared(runs: list[str], tmp_path: Path, dataset_folder: Path) -> None:
    train(
        tiny_settings(dataset_folder, optim={"lr": 1e-3}).model_copy(update={"seed": 3, "name": "slow-3"}),
        tmp_path / "slow-3",
    )
    dossier = gather([*runs[:2], str(tmp_path / "slow-3")], limit=12, stories=0)
    assert dossier.contest is None and dossier.notes[0].startswith("not compared: these 3 runs have the same settings")
    assert "slow-3" in page(dossier)


def test_too_few_documents_are_told_of(runs: list[str]) -> None:
    dossier = gather(runs, limit=5, stories=0)
    assert dossier.contest is None and any(
        note.startswith("not compared: 5 documents are too few") for note in dossier.notes
    )
    assert "Scores" in page(dossier)


def test_a_run_whose_data_is_gone_is_told_of(runs: list[str], tmp_path: Path) -> None:
    shutil.copytree(runs[0], tmp_path / "lost")
    config = tmp_path / "lost" / "config.toml"
    config.write_text(re.sub(r'path = ".*"', 'path = "nowhere"', config.read_text()), encoding="utf-8")
    dossier = gather([str(tmp_path / "lost")], limit=12, stories=1)
    assert dossier.documents is None and dossier.notes[0].startswith("not scored: the validation documents")
    assert dossier.runs[0].stories["count"] == 1 and "not scored" in page(dossier)


def test_the_command_again_quotes_what_a_shell_would_read(runs: list[str]) -> None:
    facts: RunFacts = gather(runs[:1], limit=12, stories=0).runs[0]
    assert facts.command() == f"smalllm train {runs[0]}/config.toml --out {runs[0]}-again"


def test_the_command_writes_both_files(runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "three.html"
    words = ["report", *runs, "--limit", "12", "--stories", "1", "--device", "cpu", "--x", "tokens"]
    assert cli.run([*words, "--out", str(out)]) == 0
    assert out.read_text(encoding="utf-8").startswith("<!doctype html>") and "tokens</text>" in out.read_text(
        encoding="utf-8"
    )
    told = (tmp_path / "three.md").read_text(encoding="utf-8")
    assert told.startswith("# `slow and fast`") and "▁" in told and "## Once more" in told
    assert cli.run([*words, "--out", str(tmp_path / "only.md")]) == 0
    assert (tmp_path / "only.md").read_text(encoding="utf-8") == told and not (tmp_path / "only.html").exists()
    assert "written" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "x.pdf"], "ends in .html or .md"), (["--out", "no/folder/x.html"], "there is no folder"),
        (["--stories", "-1"], "stories = -1"), (["--limit", "0"], "limit = 0"), (["--x", "hours"], "--x hours is not known"),
    ],
)  # fmt: skip
def test_mistakes_are_sentences(runs: list[str], words: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert cli.run(["report", runs[0], *words]) == 1
    assert message in capsys.readouterr().err
