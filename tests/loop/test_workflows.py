"""The workflows' steps, each workflow's in their order, as a runner starts them, on the laptop's stack.

Each job signs in with a token such as the forge's (the emulator checks its claims and the roles' policies, not its signature).
Left out: `.ci/run`, of which this test is a part, and what the forge does itself: checking out, conditions. The emulator does not
know the type of the identity provider, so that the roles are given the address of one.
"""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import boto3
import pytest
import yaml
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import ClientError

from cli import deployment, doctor
from cli.retrain import retrain
from labelloop.records import Promotion
from local.deploy import Deployment
from local.environment import ACCOUNT
from local.stack import Addresses
from local.toolchain import REPOSITORY, find_uv
from tests.laptop import Loop
from tests.recording_server import Answer, RecordingServer, Request, serving

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

ISSUE = "12"
REPOSITORY_NAME = "acme/labels"
ISSUER = "token.actions.githubusercontent.com"
PROVIDER = f"arn:aws:iam::{ACCOUNT}:oidc-provider/{ISSUER}"
MAIN, PULL_REQUEST = f"repo:{REPOSITORY_NAME}:ref:refs/heads/main", f"repo:{REPOSITORY_NAME}:pull_request"
JOBS = ("DIFF", "DEPLOY", "SMOKE", "TRAIN")
EXPRESSION = re.compile(r"\$\{\{ (.+?) \}\}")


def token(subject: str) -> str:
    """What a forge says of a job. Nobody here checks the signature, which AWS does."""
    parts = ({"alg": "none"}, {"iss": f"https://{ISSUER}", "aud": "sts.amazonaws.com", "sub": subject})
    return ".".join([*(base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode() for part in parts), "signature"])


@pytest.fixture
def forge() -> Iterator[RecordingServer]:
    """Where tokens come from, `/token/SUBJECT`, and comments go."""

    def answer(request: Request) -> Answer:
        if request.path.startswith("/token/"):
            return Answer(body={"value": token(unquote(request.path.removeprefix("/token/").partition("?")[0]))})
        return Answer(body=[]) if request.method == "GET" else Answer(201)

    with serving(answer) as server:
        yield server


class Runner:
    """Runs a workflow's steps one after the other, in one checkout, until one fails."""

    def __init__(self, loop: Loop, forge: RecordingServer, folder: Path) -> None:
        laptop = loop.deployment.laptop
        assert laptop is not None
        self.summary, self._forge = folder / "summary.md", forge
        self._environment = {
            **os.environ,
            **laptop.aws_environment(),
            "PATH": f"{find_uv().parent}{os.pathsep}{os.environ['PATH']}",
            "LABELLOOP_HOME": str(loop.stack.home),
            "LABELLOOP_MODEL_CONFIGS": str(Path(str(loop.folder.folder)).parent),
            "GITHUB_API_URL": forge.url,
            "GITHUB_REPOSITORY": REPOSITORY_NAME,
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
            **{f"secrets.AWS_{job}_{key}": "" for job in JOBS for key in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY")},
        }
        self.roles = self._let_in(laptop, context, folder)
        self._values |= {f"vars.AWS_{job}_ROLE_ARN": self.roles[job] for job in JOBS}

    @staticmethod
    def _let_in(laptop: Addresses, context: dict[str, str], folder: Path) -> dict[str, str]:
        """Deploy the workflows stack as an engineer does, with keys of one's own; the roles by job."""
        stages = folder / "stages.yaml"
        stages.write_text(json.dumps({"local": {"workflows": {"repository": REPOSITORY_NAME, "provider": PROVIDER}}}))
        context = {**context, "stage": "local", "stages": str(stages)}
        Deployment(endpoint=laptop.emulator, context=context, work=folder / "cdk", log=folder / "deploy.log").deploy(
            print, meanwhile=lambda: None
        )
        (stack,) = boto3.client("cloudformation").describe_stacks(StackName="labelloop-local-workflows")["Stacks"]
        outputs = {output["OutputKey"]: output["OutputValue"] for output in stack["Outputs"]}
        return {job: outputs[f"{job.capitalize()}RoleArn"] for job in JOBS}

    def run(self, name: str) -> dict[str, str]:
        """What each step has printed, by job and step."""
        workflow = yaml.safe_load((REPOSITORY / ".github" / "workflows" / f"{name}.yaml").read_text())
        said = {}
        for job, found in workflow["jobs"].items():
            for step in found["steps"]:
                if "run" in step:
                    given = {**workflow.get("env", {}), **step.get("env", {}), **self._token_of(job, found["permissions"])}
                    said[f"{job}/{step['name']}"] = self._step(step["run"], given)
        return said

    def _token_of(self, job: str, permissions: dict[str, str]) -> dict[str, str]:
        if permissions.get("id-token") != "write":
            return {}
        subject = quote(PULL_REQUEST if job == "diff" else MAIN, safe="")
        url = f"{self._forge.url}/token/{subject}?api-version=2"
        return {"ACTIONS_ID_TOKEN_REQUEST_URL": url, "ACTIONS_ID_TOKEN_REQUEST_TOKEN": "job"}

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


def sign_in(role: str, subject: str) -> dict[str, str]:
    """The variables of a session of the role, for a job with this subject."""
    sts: Any = boto3.client("sts", config=Config(signature_version=UNSIGNED))
    found = sts.assume_role_with_web_identity(RoleArn=role, RoleSessionName="test", WebIdentityToken=token(subject))[
        "Credentials"
    ]
    return {
        "AWS_ACCESS_KEY_ID": found["AccessKeyId"],
        "AWS_SECRET_ACCESS_KEY": found["SecretAccessKey"],
        "AWS_SESSION_TOKEN": found["SessionToken"],
    }


def comments(forge: RecordingServer) -> list[Any]:
    return [json.loads(request.body)["body"] for request in forge.requests if request.method == "POST"]


def test_the_backend_is_compared_deployed_and_tried(
    loop: Loop, first_version: Promotion, runner: Runner, forge: RecordingServer
) -> None:
    before = loop.deployment.outputs
    said = runner.run("deploy_backend")
    assert list(said) == ["synth/synthesize", "diff/compare", "diff/comment", "deploy/deploy", "smoke/try"]
    assert "Number of stacks with differences: 0" in said["diff/compare"], "this tree is what is deployed"
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
    (comment,) = comments(forge)
    promotions = loop.deployment.ledger.promotions(loop.model)
    trained = [promotions[name] for name in set(loop.job_names()) - known if name in promotions]
    promotion = next(one for one in trained if f"### digits version {one.version}\n" in comment)
    assert f"**{promotion.verdict}**" in comment
    assert f"| annotations | {promotion.n_annotations:,} |" in comment
    assert f"{promotion.value:.1%} on {promotion.holdout_images} holdout images" in comment

    jobs = loop.job_names()
    runner.run("train")
    assert "nothing new" in comments(forge)[-1]
    assert loop.job_names() == jobs


def test_only_the_right_job_gets_a_role(loop: Loop, runner: Runner) -> None:
    other = MAIN.replace("main", "other")
    for job, subject in (("DIFF", MAIN), ("DEPLOY", PULL_REQUEST), ("TRAIN", other), ("SMOKE", MAIN.replace("acme", "evil"))):
        with pytest.raises(ClientError, match="AccessDenied"):
            sign_in(runner.roles[job], subject)


def test_a_role_is_enough_for_its_job(
    loop: Loop, first_version: Promotion, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`labelloop` itself takes the emulator's own keys on a laptop; here it works with a role's, as on AWS."""
    loop.annotate_more(7)
    sessions = {job: sign_in(runner.roles[job], MAIN) for job in ("SMOKE", "TRAIN")}

    def signed_in(job: str) -> deployment.Deployment:
        for name, value in sessions[job].items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
        return deployment.Deployment(loop.deployment.stage, loop.deployment.laptop)

    checks = doctor.examine(signed_in("SMOKE"), loop.folder)
    assert {check.name: check.message for check in checks if check.state != "pass"} == {}

    said: list[str] = []
    done = retrain(signed_in("TRAIN"), loop.folder, said.append, wait=True)
    assert (done.state, bool(done.per_class)) == ("judged", True), said
