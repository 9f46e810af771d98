"""The real CDK command, bootstrapping and deploying the project's stacks into the emulator."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from botocore.exceptions import BotoCoreError, ClientError

from labelloop.errors import LocalServiceError
from local.environment import ACCOUNT, REGION, aws_client, aws_environment
from local.processes import run_to_end
from local.toolchain import REPOSITORY, cdk_command, tool_environment

APP = f"{sys.executable} -m infra_cdk.app"
_BOOTSTRAP_LIMIT_S = 120.0
_DEPLOY_LIMIT_S = 900.0
_QUIET = ["--no-notices", "--no-color", "--ci"]
# "labelloop-local-state |  3/17 | 10:11:12 AM | CREATE_COMPLETE | AWS::S3::Bucket | Images (Images9E4C3D12)"
_EVENT = re.compile(r"^(?P<stack>\S+) \| +(?P<done>\S+) \| [^|]+\| (?P<status>[A-Z_]+) +\| (?P<type>\S+) +\| (?P<name>\S+)")
_HEADLINE = re.compile(r"^(?:\W+ )?+(?P<stack>[\w-]+)(?:: (?P<doing>deploying).*| \((?P<done>no changes)\))")


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """What `cdk deploy` needs to know. `work` holds the CDK command's own files, `log` all it writes."""

    endpoint: str
    context: Mapping[str, str]
    work: Path
    log: Path
    app: str = APP
    folder: Path = REPOSITORY

    def bootstrap(self, *, meanwhile: Callable[[], None]) -> bool:
        """Prepare the account for CDK; returns False when it is prepared already. Raises `LocalServiceError`."""
        if self._is_bootstrapped():
            return False
        outside = self.work / "outside"  # in a folder with a cdk.json the command would synthesize the app first
        outside.mkdir(parents=True, exist_ok=True)
        self._cdk("cdk bootstrap", ["bootstrap", f"aws://{ACCOUNT}/{REGION}"], outside, _BOOTSTRAP_LIMIT_S, meanwhile)
        return True

    def deploy(self, report: Callable[[str], None], *, meanwhile: Callable[[], None]) -> None:
        """Deploy all stacks, reporting each stack and resource. Raises `LocalServiceError`."""
        words = ["deploy", "--all", "--require-approval", "never", "--progress", "events"]
        words += ["--app", self.app, "--output", str(self.work / "cdk.out")]
        words += [word for name, value in self.context.items() for word in ("--context", f"{name}={value}")]

        def on_line(line: str) -> None:
            if said := progress(line):
                report(said)

        self._cdk("cdk deploy", words, self.folder, _DEPLOY_LIMIT_S, meanwhile, on_line)

    def _cdk(
        self,
        part: str,
        words: list[str],
        folder: Path,
        limit_s: float,
        meanwhile: Callable[[], None],
        on_line: Callable[[str], None] = lambda _: None,
    ) -> None:
        environment = {
            **tool_environment(),
            **aws_environment(self.endpoint),
            "CDK_HOME": str(self.work / "cdk_home"),  # the command remembers there which account a key belongs to
            "CDK_DISABLE_CLI_TELEMETRY": "true",
            "CDK_DEFAULT_ACCOUNT": ACCOUNT,
            "CDK_DEFAULT_REGION": REGION,
            "JSII_SILENCE_WARNING_UNTESTED_NODE_VERSION": "1",
            "CI": "1",
        }
        run_to_end(
            part,
            [*cdk_command(self.log), *words, *_QUIET],
            log=self.log,
            environment=environment,
            folder=folder,
            limit_s=limit_s,
            on_line=on_line,
            meanwhile=meanwhile,
        )

    def _is_bootstrapped(self) -> bool:
        try:
            stacks = aws_client("cloudformation", self.endpoint).describe_stacks(StackName="CDKToolkit")["Stacks"]
        except ClientError:
            return False  # there is no such stack
        except BotoCoreError as error:
            raise LocalServiceError("emulator", f"does not answer: {error}") from error
        return bool(stacks) and stacks[0]["StackStatus"] in ("CREATE_COMPLETE", "UPDATE_COMPLETE")


def progress(line: str) -> str | None:
    """What a line of `cdk deploy` says that a person waits for: a stack's steps and what fails; else None.

    Resources are left out: the emulator makes them so fast that they come in one burst.
    """
    if event := _EVENT.match(line):
        status = event["status"].replace("_", " ").lower()
        if event["type"] == "AWS::CloudFormation::Stack" and event["status"].endswith("_COMPLETE"):
            return f"{event['stack']}: {status}"
        return f"{event['stack']}: {event['type']} {event['name']} {status}" if event["status"].endswith("_FAILED") else None
    if "Synthesis time" in line:
        return "stacks synthesized"
    if headline := _HEADLINE.match(line):
        return f"{headline['stack']}: {headline['doing'] or headline['done']}"
    return None
