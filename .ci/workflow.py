"""The steps of .github/workflows: synth, diff, deploy, smoke, train, comment. docs/deployment-workflows.md has the variables.

A step signs in to AWS for itself and hands credentials to the one command that it runs, to no later step. What a person
should read goes to the job's summary and to a file, which the step `comment` posts; that step alone gets the forge's token.
Exit codes: 0 done, 1 a check has failed, 2 something to set up (the message says what), 3 a service failed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import boto3
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from labelloop.errors import LabelloopError, exit_code
from labelloop.model_config import ModelConfigs
from local.toolchain import cdk_command, node_folder

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / ".labelloop" / "workflow"
AUDIENCE = "sts.amazonaws.com"
SMOKE_TRIES, SMOKE_WAIT_SECONDS = 3, 20.0  # API Gateway and Lambda take some seconds to let a deployment through everywhere
MOST_CHARACTERS = 60_000  # of a comment; forges take some 65,000
_SECONDS = {"train": 6 * 3600}  # of a session: as long as GitHub lets a job run; the others take an hour at most
_LABELLOOP = [sys.executable, "-m", "cli.main"]
# The job's own keys: what a command of ours starts has no use for them.
_KEPT_BACK = ("ACTIONS_ID_TOKEN_REQUEST_TOKEN", "ACTIONS_ID_TOKEN_REQUEST_URL", "ACTIONS_RUNTIME_TOKEN", "GITHUB_TOKEN")


class Refusal(Exception):
    """Why a step cannot go on, and its exit code."""

    def __init__(self, message: str, code: int = 2) -> None:
        super().__init__(message)
        self.code = code


# AWS


def signed_in(step: str) -> dict[str, str]:
    """The environment of a command that calls AWS: by the job's OIDC token if there is one, else by the keys that are there."""
    environment = without_keys()
    url, role = os.environ.get("ACTIONS_ID_TOKEN_REQUEST_URL"), os.environ.get("AWS_ROLE_ARN")
    if url and role:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
            environment.pop(name, None)
        return {**environment, **_session(role, _id_token(url), _SECONDS.get(step, 3600))}
    if os.environ.get("AWS_ACCESS_KEY_ID"):
        return environment
    raise Refusal(
        "no way to sign in to AWS: set the role's variable and `id-token: write` (GitHub), or the secrets AWS_ACCESS_KEY_ID and "
        "AWS_SECRET_ACCESS_KEY; docs/deployment-workflows.md says how"
    )


def without_keys() -> dict[str, str]:
    """This environment without the job's own keys, and without variables that a workflow left empty."""
    kept = {name: value for name, value in os.environ.items() if name not in _KEPT_BACK}
    return {name: value for name, value in kept.items() if value or not name.startswith(("AWS_", "LABELLOOP_"))}


def _id_token(url: str) -> str:
    headers = {"Authorization": f"bearer {os.environ['ACTIONS_ID_TOKEN_REQUEST_TOKEN']}"}
    return str(_request("GET", f"{url}&audience={AUDIENCE}", headers)["value"])


def _session(role: str, token: str, seconds: int) -> dict[str, str]:
    untyped: Any = boto3
    sts = untyped.client("sts", config=Config(signature_version=UNSIGNED, retries={"mode": "standard"}))
    name = f"labelloop-{os.environ.get('GITHUB_RUN_ID', 'by-hand')}"
    try:
        found = sts.assume_role_with_web_identity(
            RoleArn=role, RoleSessionName=name, WebIdentityToken=token, DurationSeconds=seconds
        )["Credentials"]
    except (BotoCoreError, ClientError) as error:
        raise Refusal(f"AWS does not let this job have {role}: {error}", 3) from error
    return {
        "AWS_ACCESS_KEY_ID": found["AccessKeyId"],
        "AWS_SECRET_ACCESS_KEY": found["SecretAccessKey"],
        "AWS_SESSION_TOKEN": found["SessionToken"],
    }


# Steps


def synth() -> int:
    """Synthesize the stage, which checks it with cdk-nag. Calls no service of AWS."""
    return run([*cdk("synth"), "--quiet"], without_keys())[0]


def diff() -> int:
    """Compare the templates with what is deployed. Reads templates, makes no change set."""
    code, said = run([*cdk("diff"), "--method", "template"], signed_in("diff"))
    title = f"`cdk diff` of the stage {stage()}" + ("" if code == 0 else ": it failed")
    publish(f"<!-- labelloop diff {stage()} -->\n### {title}\n\n{fenced(said)}")
    return code


def deploy() -> int:
    """Deploy every stack of the stage but the workflows': a deployment never changes who is let in."""
    code, said = run([*cdk("deploy"), "--require-approval", "never", "--progress", "events"], signed_in("deploy"))
    title = f"The stage {stage()} " + ("is deployed" if code == 0 else "is not deployed")
    publish(f"### {title}\n\n<details><summary>log</summary>\n\n{fenced(said)}\n\n</details>")
    return code


def smoke() -> int:
    """Ask of each model whether everything between Label Studio and its backend works: the doctor's checks."""
    environment = signed_in("smoke")
    failed = False
    text = f"### The stage {stage()} after the deployment\n\n| model | check | state | |\n|---|---|---|---|\n"
    for model in models():
        words = [*_LABELLOOP, "setup-label-studio-project", model, "--check", "--stage", stage(), "--json"]
        for last in (*[False] * (SMOKE_TRIES - 1), True):
            done = subprocess.run(words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False)
            if done.returncode == 0 or last:
                break
            time.sleep(SMOKE_WAIT_SECONDS)
        failed |= done.returncode != 0
        for check in json.loads(done.stdout or '{"checks": []}')["checks"]:
            text += f"| {model} | {check['name']} | {check['state']} | {cell(check['message'])} |\n"
        if not done.stdout:
            text += f"| {model} | all | fail | exit code {done.returncode}; the log says why |\n"
    publish(text)
    return int(failed)


def train() -> int:
    """Train the chosen models, all at once, wait for the gate's verdicts, and say how the new versions did."""
    environment = signed_in("train")
    chosen = models(required=True)
    running = [
        subprocess.Popen(
            [*_LABELLOOP, "retrain", model, "--wait", "--stage", stage(), "--json"],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for model in chosen
    ]
    answers = [process.communicate()[0] for process in running]
    publish("\n\n".join(evaluation(model, said) for model, said in zip(chosen, answers, strict=True)))
    return max(process.returncode for process in running)


def comment() -> int:
    """Post what the step before has published under the issue or pull request ISSUE; its own comment is replaced."""
    issue, file = os.environ.get("ISSUE", ""), WORK / "summary.md"
    if not issue or not file.is_file():
        print("nothing to post, or no issue or pull request to post it under")
        return 0
    if not issue.isdecimal():
        raise Refusal(f"{issue!r} is no number of an issue")
    body = file.read_text(encoding="utf-8")
    api = f"{os.environ['GITHUB_API_URL']}/repos/{os.environ['GITHUB_REPOSITORY']}/issues"
    headers = {"Authorization": f"token {os.environ['GITHUB_TOKEN']}", "Content-Type": "application/json"}
    marker = body.partition("\n")[0]
    before = None
    if marker.startswith("<!--"):
        comments = _request("GET", f"{api}/{issue}/comments?per_page=100", headers)
        before = next((one["id"] for one in comments if one["body"].startswith(marker)), None)
    if before is None:
        _request("POST", f"{api}/{issue}/comments", headers, {"body": body})
    else:
        _request("PATCH", f"{api}/comments/{before}", headers, {"body": body})
    print(f"commented on {issue}")
    return 0


STEPS: dict[str, Callable[[], int]] = {
    "synth": synth,
    "diff": diff,
    "deploy": deploy,
    "smoke": smoke,
    "train": train,
    "comment": comment,
}


# What they have in common


def stage() -> str:
    return os.environ.get("LABELLOOP_STAGE") or "prod"


def models(*, required: bool = False) -> list[str]:
    """The models of LABELLOOP_MODELS, else all; each is one that there is."""
    known = ModelConfigs.find().names
    chosen = os.environ.get("LABELLOOP_MODELS", "").replace(",", " ").split()
    if required and not chosen:
        raise Refusal(f"no model is chosen; there are: {', '.join(known)}")
    if unknown := [name for name in chosen if name not in known]:
        raise Refusal(f"there is no model {', '.join(unknown)}; there are: {', '.join(known)}")
    return chosen or known


def cdk(command: str) -> list[str]:
    """The words that start a CDK command on the stage's stacks but the workflows', with LABELLOOP_CONTEXT's context values."""
    WORK.mkdir(parents=True, exist_ok=True)
    context = [f"stage={stage()}", *os.environ.get("LABELLOOP_CONTEXT", "").split()]
    if wrong := [one for one in context if "=" not in one]:
        raise Refusal(f"LABELLOOP_CONTEXT: {wrong[0]!r} is not NAME=VALUE")
    words = [word for one in context for word in ("--context", one)]
    output = ["--output", str(WORK / "cdk.out")]
    stacks = f"labelloop-{stage()}-!(workflows)"
    return [*cdk_command(WORK / "cdk.log"), command, stacks, "--no-color", "--no-notices", "--ci", *output, *words]


def run(words: Sequence[str], environment: Mapping[str, str]) -> tuple[int, str]:
    """Run a command, show what it says as it says it; its exit code and what it said."""
    path = os.pathsep.join([str(node_folder()), environment.get("PATH", os.defpath)])
    said = []
    with subprocess.Popen(
        words, cwd=ROOT, env={**environment, "PATH": path}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        for line in process.stdout or ():
            print(line, end="")
            said.append(line)
    return process.returncode, "".join(said)


def publish(text: str) -> None:
    """Put text where a person finds it: the job's summary, and the file that `comment` posts."""
    WORK.mkdir(parents=True, exist_ok=True)
    (WORK / "summary.md").write_text(text, encoding="utf-8")
    if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        with Path(summary).open("a", encoding="utf-8") as file:
            file.write(text + "\n")


def fenced(said: str) -> str:
    """A command's words as they are, cut to what a comment holds."""
    fits = said if len(said) <= MOST_CHARACTERS else f"{said[:MOST_CHARACTERS]}\n… the job's log has the rest"
    return f"~~~~~~\n{fits.replace('~~~~~~', '~~~~~')}\n~~~~~~"


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def evaluation(model: str, said: str) -> str:
    """How a model's new version did, from what `labelloop retrain --json` said."""
    if not said:
        return f"### {model}: not trained\n\nThe job's log says why."
    done = json.loads(said)
    if done["state"] != "judged":
        return f"### {model}: {done['state']}\n\n{done['reason']}"
    rows = [("verdict", f"**{done['verdict']}**: {done['reason']}"), ("annotations", f"{done['annotations']:,}")]
    if done["metric"]:
        rows.append((done["metric"], f"{done['value']:.1%} on {done['holdout_images']:,} holdout images"))
    if done["difference"]:
        rows.append(("to the champion", points(done["difference"])))
    rows.append(("serves now", f"version {done['champion']}" if done["champion"] else "no version"))
    text = f"### {model} version {done['version']}\n\n| | |\n|---|---|\n"
    text += "".join(f"| {name} | {cell(what)} |\n" for name, what in rows)
    if done["per_class"]:
        text += "\n| class | value | to the champion |\n|---|---|---|\n"
        for name, value in done["per_class"].items():
            difference = points(done["classes"][name]) if name in done["classes"] else ""
            text += f"| {cell(name)} | {value:.1%} | {difference} |\n"
    return text


def points(difference: Mapping[str, float]) -> str:
    value, low, high = (100 * difference[key] for key in ("value", "low", "high"))
    return f"{value:+.1f} points ({low:+.1f} to {high:+.1f})"


def _request(method: str, url: str, headers: Mapping[str, str], body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    asked = urllib.request.Request(url, data=data, headers=dict(headers), method=method)
    try:
        with urllib.request.urlopen(asked, timeout=30) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise Refusal(f"{method} {url.partition('?')[0]} answers {error.code}: {error.read()[:300]!r}", 3) from error
    except (OSError, ValueError) as error:
        raise Refusal(f"{method} {url.partition('?')[0]}: {error}", 3) from error


def main(words: Sequence[str]) -> int:
    if len(words) != 1 or words[0] not in STEPS:
        print(f"which step? {', '.join(STEPS)}", file=sys.stderr)
        return 2
    try:
        return STEPS[words[0]]()
    except Refusal as refusal:
        print(f"error: {refusal}", file=sys.stderr)
        return refusal.code
    except LabelloopError as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_code(error)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
