"""`labelloop status --watch`: what it shows of a deployed stage, what it keeps while a service is away, and how it ends."""

from __future__ import annotations

import io
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import boto3
import msgspec
import pytest
from rich.console import Console
from typer.testing import CliRunner

from cli import watch
from cli.deployment import Deployment
from cli.main import app
from cli.status import Status
from cli.watch import Watch
from labelloop.errors import NotSetUpError, ServiceError
from labelloop.records import Failure, Training
from tests import examples
from tests.deployed import Stage, deployed

DIGITS = examples.CONFIGS["digits"]


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def stage(aws: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    with deployed(DIGITS, monkeypatch) as it:
        yield it


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def watched(stage: Stage, clock: Clock) -> Watch:
    return Watch(stage.deployment, [DIGITS, examples.CONFIGS["digit_detector"]], clock)


def shown(it: Watch, width: int = 140) -> str:
    file = io.StringIO()
    Console(file=file, width=width).print(it)
    return file.getvalue()


def test_before_the_first_look_it_says_that_it_asks(watched: Watch) -> None:
    assert shown(watched).count("asking") == 3  # two models and the queues


def test_it_shows_every_model_and_what_moves(stage: Stage, watched: Watch) -> None:
    stage.train(100, 0.9)
    stage.annotate(137, version=1)
    stage.label_studio.predicted = 1200
    stage.run(130)
    stage.services.epoch = 12
    watched.look()
    said = shown(watched)
    for part in (
        "version 1: accuracy",
        "trained on 100 annotations",
        "137 of ",
        "1,660 of 1,797 tasks open, 1,200 of them predicted by the champion",
        f"training, epoch 12 of {DIGITS.config.hyperparameters.epochs}; 130 annotations",
        "no alarm rings",
        "digit_detector has no Label Studio project yet; run: labelloop setup-label-studio-project digit_detector",
    ):
        assert part in " ".join(said.replace("│", " ").split()), part
    assert not any("export" in path for path in stage.label_studio_server.paths)  # that would grow with the annotations


def test_queues_dead_letters_and_alarms(stage: Stage, watched: Watch) -> None:
    sqs, cloudwatch = boto3.client("sqs"), boto3.client("cloudwatch")
    for number in range(3):
        sqs.send_message(QueueUrl=stage.queues["PrelabelQueue"], MessageBody=str(number))
    sqs.send_message(QueueUrl=stage.queues["IngestQueueDeadLetters"], MessageBody="given up")
    for name, state in ((f"labelloop-{stage.name}-serving-A", "ALARM"), (f"labelloop-{stage.name}-serving-B", "OK")):
        cloudwatch.put_metric_alarm(
            AlarmName=name, AlarmDescription=f"{name} says so", MetricName="m", Namespace="n", Threshold=1, EvaluationPeriods=1,
            Period=60, Statistic="Sum", ComparisonOperator="GreaterThanThreshold",
        )  # fmt: skip
        cloudwatch.set_alarm_state(AlarmName=name, StateValue=state, StateReason="told to")
    watched.look()
    said = [" ".join(line.replace("│", " ").split()) for line in shown(watched).splitlines()]
    assert "prelabel 3 0 0" in said
    assert "ingest 0 0 1" in said
    assert f"labelloop redrive --list --stage {stage.name} shows what was given up" in said
    alarm = f"alarm labelloop-{stage.name}-serving-A: labelloop-{stage.name}-serving-A says so"
    assert alarm in said
    assert not any("serving-B" in line for line in said)


def test_what_label_studio_said_last_stays_with_its_age(stage: Stage, watched: Watch, clock: Clock) -> None:
    stage.annotate(42)
    watched.look()
    stage.label_studio.down = True
    clock.now += 35
    watched.look()
    said = shown(watched)
    assert "42 of 100" in said
    assert "Label Studio answered" in said
    assert "the counts of Label Studio are 35 s old" in said
    clock.now += 600
    assert "the counts of Label Studio are 11 min old" in shown(watched)
    stage.label_studio.down = False
    stage.annotate(1)
    watched.look()
    said = shown(watched)
    assert "43 of 100" in said
    assert " old" not in said


def test_with_aws_away_the_last_facts_stay(stage: Stage, watched: Watch, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.train(100, 0.9)
    stage.annotate(42)
    watched.look()

    def away(*_: object, **__: object) -> None:
        raise ServiceError("the ledger does not answer")

    for name in ("read_status", "read_traffic"):
        monkeypatch.setattr(watch, name, away)
    clock.now += 61
    watched.look()
    said = shown(watched)
    assert said.count("the ledger does not answer; what stands here is 61 s old") == 3  # two models and the queues
    assert "42 of" in said
    assert "version 1: accuracy" in said
    assert "prelabel" in said


def test_a_training_that_failed_is_said(stage: Stage, watched: Watch) -> None:
    head = stage.ledger.head("digits")
    job = stage.run(100)
    failure = Failure(
        digest=job.digest,
        n_annotations=100,
        job_name=job.job_name,
        reason="out of memory",
        ended_at=job.started_at,
        consecutive=1,
    )
    running = stage.ledger.head("digits")
    assert running.sequence == head.sequence + 1

    after = type(head)(model="digits", failure=failure)
    stage.ledger.finish(running, after, Training(job=job, status="failed", failure="out of memory"))
    watched.look()
    assert f"{job.job_name}: out of memory" in shown(watched)


def test_a_stage_that_is_not_deployed_is_an_error_at_once(aws: str) -> None:
    with pytest.raises(NotSetUpError):
        Watch(Deployment("nowhere"), [DIGITS])


def test_an_interruption_ends_it_and_leaves_the_last_picture(stage: Stage, watched: Watch) -> None:
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            raise KeyboardInterrupt

    file = io.StringIO()
    watch.run(watched, Console(file=file, width=120, force_terminal=True), 7, sleep)
    assert pauses == [7, 7, 7]
    assert "none yet" in file.getvalue()
    assert file.getvalue().rstrip().endswith("\x1b[?25h")  # the cursor is shown again


@pytest.mark.parametrize("words", [["--watch"], ["--watch", "--json"]])
def test_without_a_terminal_it_says_what_to_use(words: list[str]) -> None:
    done = CliRunner().invoke(app, ["status", "digits", *words])
    assert done.exit_code == 2
    assert "labelloop status --json" in " ".join(done.output.replace("│", " ").split())


def test_control_c_in_a_terminal_ends_it_with_exit_0(stage: Stage) -> None:
    stage.annotate(42)
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "cli.main", "status", "digits", "--watch", "--every", "1", "--stage", stage.name]
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=examples.REPOSITORY, env={**os.environ, "COLUMNS": "120"},
        start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    try:
        said = _read_until(ours, "42 of 100", 60)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0, said
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def _read_until(terminal: int, wanted: str, seconds: float) -> str:
    text, until = "", time.monotonic() + seconds
    while wanted not in text:
        assert time.monotonic() < until, text
        if select.select([terminal], [], [], 1)[0]:
            text += os.read(terminal, 65536).decode(errors="replace")
    return text


def test_without_a_model_status_is_of_all_of_them(stage: Stage) -> None:
    stage.train(100, 0.9)
    command = ["status", "--stage", stage.name]
    done = CliRunner().invoke(app, [*command, "--json"], catch_exceptions=False)
    found = msgspec.json.decode(done.stdout, type=dict[str, Status])
    assert {name: len(status.versions) for name, status in found.items()} == {"digit_detector": 0, "digits": 1}
    one = CliRunner().invoke(app, [*command, "digits", "--json"], catch_exceptions=False)
    assert msgspec.json.decode(one.stdout, type=Status).model == "digits"
    text = CliRunner().invoke(app, command, catch_exceptions=False).stdout
    assert [line.split()[0] for line in text.splitlines() if f"stage {stage.name}" in line] == ["digit_detector", "digits"]
