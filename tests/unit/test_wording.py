"""How numbers are said, and that what people read says them so."""

from __future__ import annotations

import io
from datetime import UTC, datetime

import pytest
from rich.console import Console

from cli.upload import Report, show
from labelloop.policy import decide
from labelloop.records import Head
from labelloop.wording import counted
from tests.examples import DIGITS


@pytest.mark.parametrize(
    ("said", "text"),
    [
        (counted(1, "holdout image"), "1 holdout image"),
        (counted(0, "image"), "0 images"),
        (counted(2_000, "image"), "2,000 images"),
        (counted(1, "class", "classes"), "1 class"),
        (counted(3, "class", "classes"), "3 classes"),
    ],
)
def test_a_number_of_things_is_said_with_one_or_many(said: str, text: str) -> None:
    assert said == text


def test_a_first_annotation_is_one() -> None:
    assert decide(DIGITS.retrain, Head(model="digits"), 1, datetime.now(UTC)).reason == f"1 annotation of {DIGITS.retrain.at[0]}"


def test_what_an_upload_did_with_one_image_is_said_of_one() -> None:
    console = Console(file=io.StringIO(), width=130)
    show(Report(dry_run=False, copies={"b.png": "a.png"}, sent_again=1, already_annotated=1), console)
    assert console.file.getvalue().splitlines()[1:] == [  # type: ignore[attr-defined]
        "1 file is a copy of another: the task of the same content counts for both",
        "1 lay there without a task and was sent to Label Studio again",
        "annotated 0, left alone 1 that has an annotation",
    ]
