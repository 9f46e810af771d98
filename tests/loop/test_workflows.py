"""The workflows' steps, each workflow's in their order, as a runner starts them, on the laptop's stack.

Left out: `.ci/run`, of which this test is a part, and what the forge does itself (checking out, conditions, tokens).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from labelloop.records import Promotion
from local.toolchain import REPOSITORY, find_uv
from tests.laptop import Loop
from tests.recording_server import Answer, RecordingServer, Request, serving

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

ISSUE = "12"
EXPRESSION = re.compile(r"\$\{\{ (.+?) \}\}")


@pytest.fixture
def forge() -> Iterator[RecordingServer]:
    """Where comments go."""

    def answer(request: Request) -> Answer:
        return Answer(body=[]) if request.method == "GET" else Answer(201)

    with serving(answer) as server:
        yield server


class Runner:
    """Runs a workflow's steps one after the other, in one checkout, until one fails."""

    def __init__(self, loop: Loop, forge: RecordingServer, folder: Path) -> None:
        laptop = loop.deployment.laptop
        assert laptop is not None
        self.summary = folder / "summary.md"
        self._environment = {
            **os.environ,
            **laptop.aws_environment(),
            "PATH": f"{find_uv().parent}{os.pathsep}{os.environ['PATH']}",
            "LABELLOOP_HOME": str(loop.stack.home),
            "LABELLOOP_MODEL_CONFIGS": str(Path(str(loop.folder.folder)).parent),
            "GITHUB_API_URL": forge.url,
            "GITHUB_REPOSITORY": "acme/labels",
            "GITHUB_STEP_SUMMARY": str(self.summary),
        }
        context = {
            "label_studio_url": laptop.label_studio,
            "mlflow_url": laptop.mlflow,
            "sagemaker_endpoint": laptop.sagemaker,
            "model_configs": self._environment["LABELLOOP_MODEL_CONFIGS"],
        }
        self._values = {
            "vars.LABELLOOP_STAGE": "local",
            "vars.LABELLOOP_CONTEXT": " ".join(f"{name}={value}" for name, value in context.items()),
            "vars.LABELLOOP_MODELS": loop.model,
            "inputs.model || vars.LABELLOOP_TRAIN_MODELS": loop.model,
            "vars.AWS_REGION": laptop.region,
            "github.event.pull_request.number": ISSUE,
            "inputs.issue": ISSUE,
            "github.token": "forge-token",
            **{f"vars.AWS_{job}_ROLE_ARN": "" for job in ("DIFF", "DEPLOY", "SMOKE", "TRAIN")},
            **{f"secrets.AWS_{job}_ACCESS_KEY_ID": "test" for job in ("DIFF", "DEPLOY", "SMOKE", "TRAIN")},
            **{f"secrets.AWS_{job}_SECRET_ACCESS_KEY": "test" for job in ("DIFF", "DEPLOY", "SMOKE", "TRAIN")},
        }

    def run(self, name: str) -> dict[str, str]:
        """What each step has printed, by job and step."""
        workflow = yaml.safe_load((REPOSITORY / ".github" / "workflows" / f"{name}.yaml").read_text())
        said = {}
        for job, found in workflow["jobs"].items():
            for step in found["steps"]:
                if "run" in step:
                    given = {**workflow.get("env", {}), **step.get("env", {})}
                    said[f"{job}/{step['name']}"] = self._step(step["run"], given)
        return said

    def _step(self, command: str, given: dict[str, str]) -> str:
        values = {key: EXPRESSION.sub(lambda found: self._values[found[1]], text) for key, text in given.items()}
        done = subprocess.run(
            ["bash", "-e", "-c", command],
            cwd=REPOSITORY,
            env={**self._environment, **values},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-5000:]}"
        return done.stdout


@pytest.fixture
def runner(loop: Loop, forge: RecordingServer, tmp_path: Path) -> Runner:
    return Runner(loop, forge, tmp_path)


def comments(forge: RecordingServer) -> list[Any]:
    return [json.loads(request.body)["body"] for request in forge.requests if request.method == "POST"]


def test_the_backend_is_compared_deployed_and_tried(
    loop: Loop, first_version: Promotion, runner: Runner, forge: RecordingServer
) -> None:
    before = loop.deployment.outputs
    said = runner.run("deploy_backend")
    assert list(said) == ["synth/synthesize", "diff/compare", "diff/comment", "deploy/deploy", "smoke/try"]
    assert "Number of stacks with differences" in said["diff/compare"]
    (comment,) = comments(forge)
    assert comment.startswith("<!-- labelloop diff local -->")
    summary = runner.summary.read_text()
    assert "The stage local is deployed" in summary
    assert "| digits | prediction | pass |" in summary
    assert "| fail |" not in summary
    del loop.deployment.outputs
    assert loop.deployment.outputs == before, "the same tree deploys the same stacks"


def test_a_chosen_model_is_trained_and_its_evaluation_posted(
    loop: Loop, first_version: Promotion, runner: Runner, forge: RecordingServer
) -> None:
    known = set(loop.job_names())
    loop.annotate_more(7)
    said = runner.run("train")
    assert list(said) == ["train/train", "train/comment"]
    (new,) = set(loop.job_names()) - known
    promotion = loop.deployment.ledger.promotion(loop.model, new)
    assert promotion is not None
    (comment,) = comments(forge)
    assert f"### digits version {promotion.version}" in comment
    assert f"**{promotion.verdict}**" in comment
    assert f"| annotations | {promotion.n_annotations:,} |" in comment
    assert f"{promotion.value:.1%} on {promotion.holdout_images} holdout images" in comment

    again = runner.run("train")
    assert "nothing to post" not in again["train/comment"]
    assert "nothing new" in comments(forge)[-1]
    assert len(loop.job_names()) == len(known) + 1
