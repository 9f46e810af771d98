"""One deployment of labelloop: its names, its context values, and everything in which a laptop differs from AWS."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from urllib.parse import urlsplit

import aws_cdk as cdk
from constructs import Node

from infra_cdk.sources import ROOT
from labelloop.errors import ConfigError
from labelloop.model_config import ModelConfig, ModelConfigs

LOCAL = "local"
_NAME = re.compile(r"[a-z][a-z0-9]{0,15}")
_MAX_JOB_NAME = 63  # characters, SageMaker's limit
_CONTEXT = "context of `cdk`"
_MOST_READY = 100  # execution environments of predict that are kept; more than it may use, where that is bounded
_GITHUB = "https://token.actions.githubusercontent.com"
# GitHub writes `owner@123/name@456` for repositories that were made or renamed since July 2026, Forgejo `owner-123/name-456`.
_REPOSITORY = re.compile(r"[\w.-]+(@\d+)?/[\w.-]+(@\d+)?", re.ASCII)
_PROVIDER = re.compile(r"arn:[\w-]+:iam::\d{12}:oidc-provider/\S+", re.ASCII)
_BRANCH = re.compile(r"[\w./-]+", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Workflows:
    """Whose workflows AWS lets in. `repository` stands as it does in the tokens' subject; `provider` is an ARN, None to make one.

    Raises `ConfigError`.
    """

    repository: str
    issuer: str = _GITHUB
    provider: str | None = None
    main: str = "main"

    def __post_init__(self) -> None:
        if not _REPOSITORY.fullmatch(self.repository):
            raise ConfigError(_CONTEXT, f"{self.repository!r} is not owner/name or owner@id/name@id", "github_repository")
        if not self.issuer.startswith("https://") or "*" in self.issuer:
            raise ConfigError(_CONTEXT, f"{self.issuer!r} is no https address", "oidc_issuer")
        if self.provider and not _PROVIDER.fullmatch(self.provider):
            raise ConfigError(_CONTEXT, f"{self.provider!r} is no ARN of an OIDC provider", "oidc_provider")
        if not _BRANCH.fullmatch(self.main):
            raise ConfigError(_CONTEXT, f"{self.main!r} is no name of a branch", "main_branch")

    @property
    def branch(self) -> str:
        """The subject of a token of the main branch."""
        return f"repo:{self.repository}:ref:refs/heads/{self.main}"

    @property
    def pull_requests(self) -> str:
        """The subject of a token of a pull request. A fork's gets none."""
        return f"repo:{self.repository}:pull_request"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What `-c` says about a deployment. Raises `ConfigError` when values or model configs are wrong.

    `mlflow_url`: absent on AWS where the state stack makes a serverless MLflow App. `sagemaker_endpoint`: only on a laptop.
    `reserves_concurrency`: whether what the API runs is bounded; an account that may run only 10 functions at once cannot.
    `predict_start`: `cold`; `snapshot` (Lambda's SnapStart); or how many of its environments are kept ready. Both
    of the latter cost by the hour.
    `workflows`: absent where no workflow is let in.
    """

    name: str
    models: ModelConfigs
    label_studio_url: str | None = None
    mlflow_url: str | None = None
    sagemaker_endpoint: str | None = None
    reserves_concurrency: bool = True
    predict_start: str = "cold"
    workflows: Workflows | None = None

    def __post_init__(self) -> None:
        # No hyphen: job names start with `labelloop-{stage}-`, and no stage may see another's.
        if not _NAME.fullmatch(self.name):
            raise ConfigError(_CONTEXT, f"{self.name!r} is no stage name; use up to 16 lower-case letters and digits", "stage")
        for key in ("label_studio_url", "mlflow_url", "sagemaker_endpoint"):
            value = getattr(self, key)
            if value and (urlsplit(value).scheme not in ("http", "https") or not urlsplit(value).netloc):
                raise ConfigError(_CONTEXT, f"{value!r} is no http(s) address", key)
            if self.is_local and not value:
                raise ConfigError(_CONTEXT, f"the stage {LOCAL!r} needs it; pass it with -c {key}=URL", key)
        if self.sagemaker_endpoint and not self.is_local:
            raise ConfigError(_CONTEXT, f"only the stage {LOCAL!r} has a stand-in for SageMaker; remove it", "sagemaker_endpoint")
        if self.predict_start not in ("cold", "snapshot") and not 1 <= self.predict_ready <= _MOST_READY:
            text = f"{self.predict_start!r} is none of cold, snapshot, 1 to {_MOST_READY}"
            raise ConfigError(_CONTEXT, text, "predict_start")
        if self.is_local and self.predict_start != "cold":
            raise ConfigError(_CONTEXT, f"the stage {LOCAL!r} starts functions cold; remove it", "predict_start")
        if not self.models.names:
            raise ConfigError(str(self.models.root), "holds no model config")
        for config in self.configs:
            job = f"{self.job_prefix}{config.name}-{'0' * 12}-999"
            if len(job) > _MAX_JOB_NAME:
                raise ConfigError(
                    str(self.models[config.name].folder),
                    f"is {len(job) - _MAX_JOB_NAME} characters too long for a training job's name in the stage {self.name!r}",
                    "name",
                )

    @classmethod
    def from_context(cls, node: Node) -> Stage:
        """Read the context values of a CDK app."""

        def value(key: str) -> str | None:
            found: Any = node.try_get_context(key)
            return None if found in (None, "") else str(found)

        return cls(
            name=value("stage") or "dev",
            models=ModelConfigs(ROOT / (value("model_configs") or "model_configs")),
            label_studio_url=_without_slash(value("label_studio_url")),
            mlflow_url=_without_slash(value("mlflow_url")),
            sagemaker_endpoint=_without_slash(value("sagemaker_endpoint")),
            reserves_concurrency=_yes_or_no(value("reserved_concurrency") or "yes"),
            predict_start=value("predict_start") or "cold",
            workflows=Workflows(
                repository=repository,
                issuer=_without_slash(value("oidc_issuer")) or _GITHUB,
                provider=value("oidc_provider"),
                main=value("main_branch") or "main",
            )
            if (repository := value("github_repository"))
            else None,
        )

    @cached_property
    def configs(self) -> list[ModelConfig]:
        """The config of every model, each checked against its label config."""
        for name in self.models.names:
            _ = self.models[name].label_config
        return [self.models[name].config for name in self.models.names]

    @property
    def predict_ready(self) -> int:
        """How many of predict's environments are kept ready."""
        return int(self.predict_start) if self.predict_start.isascii() and self.predict_start.isdecimal() else 0

    @property
    def prefix(self) -> str:
        return f"labelloop-{self.name}"

    @property
    def job_prefix(self) -> str:
        """What the names of the stage's training jobs begin with."""
        return f"{self.prefix}-"

    @property
    def label_studio_secret(self) -> str:
        return f"labelloop/{self.name}/label-studio"

    @property
    def backend_secret_prefix(self) -> str:
        return f"labelloop/{self.name}/backend/"

    @property
    def label_studio_origin(self) -> str | None:
        """Scheme, host and port of Label Studio, as a browser names it to a bucket."""
        if not self.label_studio_url:
            return None
        parts = urlsplit(self.label_studio_url)
        return f"{parts.scheme}://{parts.netloc}"

    # What follows, and nothing else, differs on a laptop.

    @property
    def is_local(self) -> bool:
        return self.name == LOCAL

    @property
    def env(self) -> cdk.Environment:
        """The emulator's account and region; on AWS those of the caller's credentials, where the CDK CLI knows them."""
        if self.is_local:
            return cdk.Environment(account="000000000000", region="us-east-1")
        return cdk.Environment(account=os.environ.get("CDK_DEFAULT_ACCOUNT"), region=os.environ.get("CDK_DEFAULT_REGION"))

    @property
    def training_event_sources(self) -> list[str]:
        """Who says that a training job has ended. The emulator refuses events in the name of AWS, as AWS does."""
        return ["aws.sagemaker", "labelloop.sagemaker"] if self.is_local else ["aws.sagemaker"]

    @property
    def sagemaker_environment(self) -> dict[str, str]:
        """Leads SageMaker's client to the stand-in; the emulator has no SageMaker."""
        return {"AWS_ENDPOINT_URL_SAGEMAKER": self.sagemaker_endpoint} if self.sagemaker_endpoint else {}


def _without_slash(url: str | None) -> str | None:
    return url.rstrip("/") if url else None


def _yes_or_no(text: str) -> bool:
    if text.lower() not in ("yes", "no", "true", "false"):
        raise ConfigError(_CONTEXT, f"{text!r} is neither yes nor no", "reserved_concurrency")
    return text.lower() in ("yes", "true")
