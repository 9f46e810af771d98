"""The detection example through the whole demo: mAP rises, and the boxes that annotators see lie on the digits."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from playwright.sync_api import expect

from cli import examples
from labelloop.label_studio.payloads import Annotation
from labelloop.model_config import ModelConfigs
from labelloop.problem_types import of
from labelloop.problem_types.detection import iou
from labelloop.records import Region
from tests.browser.sign_in import REGIONS, signed_in
from tests.laptop import connect, wait_for

ARTIFACTS = Path("test-artifacts")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_demo_teaches_a_detector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report, home = tmp_path / "report.json", tmp_path / "demo"
    words = ["demo", "--model", "digit_detector", "--report", str(report), "--home", str(home)]
    with (tmp_path / "demo.log").open("w") as log:
        demo = subprocess.Popen([sys.executable, "-m", "cli.main", *words], stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_for(lambda: report.exists() or demo.poll() is not None, 1500, "the demo's report")
        assert demo.poll() is None, (tmp_path / "demo.log").read_text()
        first, last = json.loads(report.read_text())["versions"]
        assert last["annotations"] > first["annotations"]
        assert last["champion"]
        assert last["value"] > first["value"]
        assert last["value"] > 0.75
        assert last["served_value"] > first["served_value"]
        look_at_boxes(home, monkeypatch)
    finally:
        demo.send_signal(signal.SIGINT)
        assert demo.wait(timeout=120) == 0


def look_at_boxes(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Open unlabelled tasks in a browser: most boxes that are there lie on a digit, and are called what it is."""
    deployment = connect(home, monkeypatch)
    folder, addresses = ModelConfigs.find()["digit_detector"], deployment.laptop
    assert addresses is not None
    project = deployment.ledger.project("digit_detector")
    truth = {example.sha256: example.truth for example in examples.load("digit_detector")}
    tasks = [task for task in deployment.label_studio.tasks(project, "image") if not task.annotations][:5]
    hits = shown = digits = 0
    with signed_in(addresses) as page:
        for task in tasks:
            page.goto(f"{addresses.label_studio}/projects/{project}/data?task={task.id}")
            expect(page.get_by_role("button", name="Submit current annotation")).to_be_visible(timeout=30_000)
            wait_for(lambda: page.evaluate(REGIONS), 20, f"boxes on task {task.id}")
            boxes = of("detection").annotated(
                msgspec.convert({"id": 1, "result": page.evaluate(REGIONS)}, Annotation), folder.label_config
            )
            ARTIFACTS.mkdir(exist_ok=True)
            page.screenshot(path=ARTIFACTS / f"digit-detector-{task.id}.png")
            there = truth[task.sha256 or ""]
            digits, shown = digits + len(there), shown + len(boxes)
            hits += sum(any(same(box, digit) for digit in there) for box in boxes)
    assert hits / shown > 0.6, f"{hits} of {shown} boxes"
    assert hits / digits > 0.6, f"{hits} of {digits} digits"


def same(box: Region, digit: Region) -> bool:
    assert box.box is not None
    assert digit.box is not None
    return box.label == digit.label and iou(box.box, digit.box) > 0.5
