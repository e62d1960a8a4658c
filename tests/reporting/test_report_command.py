"""`blockwise-lr report`: what it says of known runs, and a page that needs nothing else."""

import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from blockwise_lr.cli import app
from blockwise_lr.measure import csv_sink
from blockwise_lr.reporting import find_runs, report_of
from blockwise_lr.reporting.pictures import _BLOCK_STYLES, STYLES
from blockwise_lr.tuning.statistics import interval

DEMO = "examples/demo/results/python-3.11.2.json"
ROWS = "examples/reproduce/rows/0.3M-5tpp-2k-{}-seed{}.json"
MEGATRON = Path(__file__).with_name("megatron.log")


def report(*words):
    return CliRunner(env={"COLUMNS": "120"}).invoke(app, ["report", *map(str, words)])


class Page(HTMLParser):
    """Tags with their attributes, ids, and the text of tables' cells."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.ids, self.cells, self._in_cell = [], [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags.append((tag, found))
        self.ids += [found["id"]] if "id" in found else []
        self._in_cell = tag in ("td", "th")

    def handle_data(self, data):
        if self._in_cell and data.strip():
            self.cells.append(data.strip())


def curve(step, losses, name="loss"):
    return "".join(f"step {at} {name} {loss}\n" for at, loss in zip(step, losses))


def test_the_demos_page_needs_nothing_else(tmp_path):
    page = tmp_path / "out" / "demo.html"
    done = report(DEMO, "--output", page, "--markdown", tmp_path / "demo.md")
    assert done.exit_code == 0, done.output
    text = page.read_text()
    found = Page(text)
    places = [
        value for _, attributes in found.tags for name, value in attributes.items() if name.endswith(("src", "href"))
    ]
    assert all(value.startswith("#") for value in places)  # within a picture
    assert not re.search(r"@import|<script|<link|url\((?!#)", text)
    assert max(Counter(found.ids).values()) == 1
    references = re.findall(r'(?:href="|url\()#([^")]+)', text)
    assert references and set(references) <= set(found.ids)
    pictures = [attributes for tag, attributes in found.tags if tag == "svg" and attributes.get("class") != "sample"]
    assert len(pictures) >= 3 and all("viewbox" in one and "width" not in one for one in pictures)
    assert "AdamW, lr 0.002" in found.cells and "Written by blockwise-lr" in text
    markdown = (tmp_path / "demo.md").read_text()
    linked = re.findall(r"!\[.*?\]\((.*?)\)", markdown)
    assert len(linked) == len(pictures) and all((tmp_path / file).read_text().startswith("<svg") for file in linked)
    assert "| AdamW, lr 0.002 | 2 | 200 |" in markdown


def test_steps_to_equal_loss_are_the_demos(tmp_path):
    """Beside a straight line through the points of its results, and its page's mean losses."""
    done = report(DEMO, "--output", tmp_path / "a.html", "--json")
    found = {arm["name"]: arm for arm in json.loads(done.stdout)["arms"]}
    rows = json.loads(Path(DEMO).read_text())["runs"]
    base, ours = (
        [row for row in rows if row["optimizer"] == "AdamW"],
        [r for r in rows if r["optimizer"] == "BlockwiseAdamW"],
    )
    expected = [
        float(np.interp(-adamw["losses"][-1], [-loss for loss in row["losses"]], row["steps"]))
        for adamw, row in zip(base, ours)
    ]
    arm = found["BlockwiseAdamW, lr 0.001"]
    assert arm["steps_to_base"] == pytest.approx(expected) and 60 < np.mean(expected) < 67  # 63 on its page
    assert arm["seconds_to_base"] == pytest.approx([row["seconds"] * at / 200 for row, at in zip(ours, expected)])
    assert np.mean(arm["gain"]) == pytest.approx(3.414 - 2.934, abs=1e-3)
    done = report(DEMO, "--output", tmp_path / "a.html", "--json", "--base", "BlockwiseAdamW, lr 0.001")
    other = {arm["name"]: arm for arm in json.loads(done.stdout)["arms"]}
    assert other["AdamW, lr 0.002"]["steps_to_base"] == [None, None]
    assert arm["runs"][0]["costs"]["optimizer state a rank"] == pytest.approx(4.07 * 2**20, rel=1e-3)


def test_the_evidences_gain_comes_with_its_interval(tmp_path):
    files = [ROWS.format(arm, seed) for arm in ("adamw-lr0.004", "blockwise-lr0.0005") for seed in range(3)]
    done = report(*files, "--output", tmp_path / "a.html")
    assert done.exit_code == 0, done.output
    finals = [json.loads(Path(file).read_text())["final"] for file in files]
    mean, half = interval([a - b for a, b in zip(finals[:3], finals[3:])])
    assert f"{mean:+.4f} ± {half:.4f}" in done.stdout
    assert re.search(rf"756 x 2k .*\+{mean:.3f} ± {half:.3f}", Path("README.md").read_text())
    text = (tmp_path / "a.html").read_text()
    assert "tokens_per_parameter" in text and "transformers" in text and "peak memory" in text


def test_two_runs_of_megatron_are_compared_by_block_type(tmp_path):
    other = tmp_path / "adam.log"
    text = re.sub(r".* iteration \d+ [a-z_ ]+\|.*\n", "", MEGATRON.read_text().replace(" 1234", " 5678"))
    other.write_text(text)
    done = report(f"adam={other}", f"blockwise={MEGATRON}", "--output", tmp_path / "a.html")
    assert done.exit_code == 0, done.output
    page = Page((tmp_path / "a.html").read_text())
    titles = re.findall(r"<b>(.*?)</b>", (tmp_path / "a.html").read_text())
    for title in ("validation loss over steps", "training loss over time", "update over weight, blockwise", "adam"):
        assert title in titles
    assert "of the base's steps" not in page.cells or "adam" in page.cells
    row = page.cells.index("seed", page.cells.index("settings"))
    assert page.cells[row : row + 3] == ["seed", "5678", "1234"]  # differs, a column per run


def test_seeds_are_one_arm_and_the_base_can_be_named(tmp_path):
    for arm, offset in (("old", 0.5), ("new", 0.0)):
        for seed in (1, 2, 3):
            losses = [5, 4 + offset, 3 + offset + seed / 100]
            (tmp_path / f"{arm}-seed{seed}.log").write_text(curve((10, 20, 30), losses, "val loss"))
    made = report_of(find_runs(str(tmp_path)))
    assert [(arm.name.rpartition("/")[2], len(arm.runs)) for arm in made.arms] == [("new", 3), ("old", 3)]
    done = report(tmp_path, "--base", "old", "--output", tmp_path / "a.html")
    assert done.exit_code == 0, done.output
    assert re.search(r"new +│ +\+0\.5000 ± 0\.0000 │ +25 │ +83% │", done.stdout), done.stdout
    wrong = report(tmp_path, "--base", "older", "--output", tmp_path / "b.html")
    assert wrong.exit_code == 2 and "--base is 'older'; use one of new, old" in wrong.output
    assert not (tmp_path / "b.html").exists()


def test_a_training_loss_is_judged_by_its_last_twentieth(tmp_path):
    noise = np.random.default_rng(0).normal(0, 0.3, 400)
    losses = 4 - np.linspace(0, 1, 400) + noise
    (tmp_path / "a.log").write_text(curve(range(1, 401), losses))
    (run,) = report_of(find_runs(str(tmp_path))).as_dict()["arms"][0]["runs"]
    assert run["final"]["loss"] == pytest.approx(losses[-20:].mean())


def test_figures_of_blocks_alone_make_a_page(tmp_path):
    csv_sink(tmp_path / "m.csv")({"sharpness/qk": 1e-6, "sharpness_error/qk": 1e-7, "loss_ratio": float("inf")}, 5)
    csv_sink(tmp_path / "m.csv")({"sharpness/qk": 2e-6, "sharpness_error/qk": 1e-7, "loss_ratio": 1.0}, 10)
    done = report(tmp_path, "--output", tmp_path / "a.html")
    assert done.exit_code == 0, done.output
    text = (tmp_path / "a.html").read_text()
    assert "<h2>Sharpness</h2>" in text and "loss_ratio" in text and "<h2>Losses</h2>" not in text


def test_styles_differ_without_their_colours():
    for styles in (STYLES, tuple(_BLOCK_STYLES.values())):
        assert len({(style.dash, style.marker) for style in styles}) == len(styles)


@pytest.mark.parametrize(
    ("files", "words", "said"),
    [
        ({}, ["nowhere"], "nowhere is neither a file nor a folder"),
        ({"a.txt": "nothing\n", "b.csv": "x,y\n1,2\n"}, ["."], "none of the 2 files in . is one that report reads"),
        ({"a.txt": "nothing\n"}, ["a.txt"], "a.txt is not one that report reads"),
        (
            {"events.out.tfevents.1": "no events at all, but a text"},
            ["."],
            "none of the 1 files in . is one that report reads",
        ),
        ({"a.csv": b"step,loss\n1,\xff\xfe\n"}, ["a.csv"], "a.csv cannot be read as CSV"),
        (
            {"a.log": "step 1 loss 2\n"},
            ["a.log", "--output", "a.pdf"],
            "--output is a.pdf; name a file that ends with .html",
        ),
        (
            {"a.log": "step 1 loss 2\n", "b.csv": "step,accuracy\n1,2\n"},
            ["a.log", "b.csv"],
            "the runs have no figure in common (a: loss; b: accuracy)",
        ),
        (
            {"a.log": "step 1 loss 2\n", "Train_Samples_train_loss.csv": "step,train_loss\n8,2\n"},
            ["a.log", "Train_Samples_train_loss.csv"],
            "loss is counted in steps in some runs and in samples in others",
        ),
    ],
    ids=lambda value: "",
)
def test_bad_input_is_one_sentence_and_writes_nothing(tmp_path, monkeypatch, files, words, said):
    monkeypatch.chdir(tmp_path)
    for name, text in files.items():
        Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
    done = report(*words)
    assert done.exit_code == 2 and said in done.output, done.output
    assert done.output.count("blockwise-lr report:") == 1 and not Path("report.html").exists()
