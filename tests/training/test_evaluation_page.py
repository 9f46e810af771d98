"""evaluation.html: what a person reads of a version, whatever its problem type, in one file that needs nothing else."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pytest

from labelloop.records import Evaluation, HoldoutImage, Int8, Interval, LabelsSaved, Probe, Region, Scores, Timing
from tests import examples
from training_jobs import evaluation_page


class Page(HTMLParser):
    """A page's text, tags, and what it would fetch."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [str(value) for name, value in attrs if name in ("src", "href", "xlink:href") and value]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def page(report: Evaluation, folder: Path) -> Page:
    evaluation_page.write(report, folder / "evaluation.html")
    return Page((folder / "evaluation.html").read_text(encoding="utf-8"))


def scores(version: int, classes: list[str], *, diagonal: int = 9) -> Scores:
    matrix = [
        [diagonal if row == column else int(row + 1 == column) for column in range(len(classes))] for row in range(len(classes))
    ]
    return Scores(metric="accuracy", value=0.9, per_class={classes[0]: 0.875}, confusion=matrix, version=version)


def report(classes: list[str]) -> Evaluation:
    """A version 2 that was compared on the first of the classes."""
    compared = examples.comparison(
        0.95, 0.9, spread=0.04, classes=classes, per_class={classes[0]: Interval(value=-0.08, low=-0.12, high=-0.01)}
    )
    whole = examples.evaluation(2, 0.95, champion=examples.scores(1, 0.9), compared=compared)
    truth = [Region(label=classes[0])]
    return msgspec.structs.replace(
        whole,
        classes=classes,
        challenger=scores(2, classes),
        champion=scores(1, classes, diagonal=7),
        holdout=[HoldoutImage(sha256="0" * 64, truth=truth, challenger=truth, champion=truth)] * 8,
        labels_saved=LabelsSaved(share=Interval(value=0.41, low=0.22, high=0.55), control=90),
        accept_from=0.987,
        suspects=[examples.suspect("cat", "dog")],
        verdict="promote",
        reason="better: it is",
    )


def test_it_says_the_verdict_and_what_it_rests_on(tmp_path: Path) -> None:
    found = page(report(["cat", "dog"]), tmp_path)
    for said in (
        "digits, version 2",
        "Promote: it takes over Better: it is.",
        "+5.0 points +1.0 to +9.0",
        "Only this version has 1 image right, only the champion 0. McNemar's exact test: p = 0.5.",
        "cat 8 87.5% 87.5% -8.0 -12.0 to -1.0",
        "dog 0 – – –",
        "calibration error 2.0%",
        "labels saved 41% 22% to 55%",
        "from 98.7%",
        "suspicious annotations 1",
        "7 cat dog 0.05",
        "of them trained on 70",
        "As a rule 8 holdout images tell apart versions that differ by 21.9 points; these two from about 4.0 points on.",
    ):
        assert said in found.text, said
    assert found.tags.count("svg") == 2
    assert "training job took" not in found.text  # an older job did not say


def test_it_says_what_the_training_job_took(tmp_path: Path) -> None:
    timing = Timing(seconds={"fit": 3.25, "record": 1.0}, images_per_second=None, waiting=None, decoded=12)
    found = page(msgspec.structs.replace(report(["cat", "dog"]), timing=timing), tmp_path)
    assert "The training job took 4 s: fit 3.2, record 1.0; 12 images decoded." in found.text


def test_it_says_which_numbers_serve_and_why(tmp_path: Path) -> None:
    whole = report(["cat", "dog"])
    for chosen, name in ((True, "int8"), (False, "float")):
        said = msgspec.structs.replace(whole, int8=Int8(chosen=chosen, reason="5 < 7 ms"))
        found = page(said, tmp_path)
        assert f"reckons with {name} Why {name}: 5 < 7 ms." in found.text
    assert "reckons with" not in page(whole, tmp_path).text  # a report of before


def test_it_says_what_the_linear_probe_came_to(tmp_path: Path) -> None:
    whole = report(["a", "b"])
    said = page(msgspec.structs.replace(whole, probe=Probe(kept=0, value=0.91, fitted=0.9, chosen=True)), tmp_path).text
    assert "91.0% · 90.0%; the probe serves" in said
    said = page(msgspec.structs.replace(whole, probe=Probe(kept=0, value=0.89, fitted=0.9, chosen=False)), tmp_path).text
    assert "89.0% · 90.0%" in said
    assert "the probe serves" not in said
    assert "probe" not in page(msgspec.structs.replace(whole, probe=None), tmp_path).text


def test_it_needs_nothing_else(tmp_path: Path) -> None:
    found = page(report(["cat", "dog"]), tmp_path)
    assert [address for address in found.fetched if not address.startswith(("#", "data:"))] == []
    assert not {"script", "link", "iframe", "img"} & set(found.tags)
    assert not re.search(r"url\((?!#)", (tmp_path / "evaluation.html").read_text())


def test_names_are_text_and_nothing_else(tmp_path: Path) -> None:
    hostile = ["<script>alert(1)</script>", "$x_{", '"&amp;', "größer"]
    odd = msgspec.structs.replace(
        report(hostile), reason="<b>odd</b>", model="<i>m</i>", suspects=[examples.suspect("<u>", "&lt;")]
    )
    found = page(odd, tmp_path)
    assert set(found.tags) == set(page(report(["one", "two", "three", "four"]), tmp_path).tags)
    for name in [*hostile, "<b>odd</b>", "<i>m</i>, version 2", "&lt;"]:
        assert name in found.text, name


def test_the_first_version_has_nothing_to_be_compared_with(tmp_path: Path) -> None:
    first = msgspec.structs.replace(
        report(["cat", "dog"]), champion=None, comparison=None, labels_saved=None, accept_from=None, suspects=[]
    )
    found = page(msgspec.structs.replace(first, calibration_error=None), tmp_path)
    assert "Challenger against champion" not in found.text
    assert "not measured" in found.text
    assert found.tags.count("svg") == 1


def test_problems_without_a_confusion_matrix_have_a_page_too(tmp_path: Path) -> None:
    whole = report(["cat", "dog"])
    plain = Scores(metric="map_50", value=0.8, per_class={"cat": 0.8}, confusion=None, version=2)
    assert whole.comparison is not None
    compared = msgspec.structs.replace(whole.comparison, p_value=None, needed=900)
    boxes = msgspec.structs.replace(
        whole, problem_type="detection", challenger=plain, champion=plain, comparison=compared, verdict="undecided"
    )
    found = page(boxes, tmp_path)
    assert "mAP@0.5" in found.text
    assert "average precision" in found.text
    assert "paired bootstrap" in found.text
    assert "about 900 images would decide" in found.text
    assert "Undecided: the champion goes on serving" in found.text
    assert found.tags.count("svg") == 1


@pytest.mark.parametrize("count", [21, 70])
def test_many_classes_still_make_a_page(tmp_path: Path, count: int) -> None:
    names = [f"class {number}" for number in range(count)]
    found = page(report(names), tmp_path)
    assert all(name in found.text for name in names)
