"""One deployment of labelloop: its names, its facts, its outputs, and everything in which a laptop differs from AWS."""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aws_cdk as cdk
import msgspec
from aws_cdk import aws_logs as logs
from constructs import Node

from infra_cdk.sources import ROOT
from infra_cdk.stage_facts import LOCAL, STAGES, StageFacts, is_address, read_facts
from labelloop.errors import ConfigError
from labelloop.model_config import ModelConfig, ModelConfigs

_MAX_JOB_NAME = 63  # characters, SageMaker's limit
_CONTEXT = "context of `cdk`"
# What `-c` may say. Which stage; where it and its models are described, as tests do; and where a laptop's parts are, whose ports
# change with every start. All else of a stage stands in stages.yaml.
_ADDRESSES = ("label_studio_url", "mlflow_url", "sagemaker_endpoint")
_KNOWN = ("stage", "stages", "model_configs", *_ADDRESSES)
_OURS = re.compile(r"[a-z_]+")  # the CDK's own values have colons, hyphens or slashes in their names


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What stages.yaml, or for a laptop `-c`, says of a deployment. Raises `ConfigError` when models do not fit it.

    `file`: the stages.yaml that was read. `sagemaker_endpoint`: only on a laptop.
    """

    name: str
    models: ModelConfigs
    facts: StageFacts
    file: Path = STAGES
    sagemaker_endpoint: str | None = None

    def __post_init__(self) -> None:
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
        """The stage that a CDK app's context names."""
        context: dict[str, Any] = node.get_all_context() or {}
        for key in context:
            if _OURS.fullmatch(key) and key not in _KNOWN:
                near = difflib.get_close_matches(key, _KNOWN, n=1)
                hint = f"did you mean {near[0]}?" if near else "what there is to know of a stage stands in stages.yaml"
                raise ConfigError(_CONTEXT, f"there is no such value; {hint}", key)
        given = {key: str(context[key]) for key in _KNOWN if context.get(key) not in (None, "")}
        name = given.get("stage", "dev")
        file = ROOT / given.get("stages", STAGES)
        facts = read_facts(name, file)
        models = ModelConfigs(ROOT / given.get("model_configs", "model_configs"))
        addresses = {key: given[key].rstrip("/") for key in _ADDRESSES if key in given}
        if name != LOCAL:
            for key in addresses:
                raise ConfigError(_CONTEXT, f"is the laptop's, the stage {LOCAL!r}; of other stages stages.yaml tells", key)
            return cls(name=name, models=models, facts=facts, file=file)
        for key in _ADDRESSES:
            if key not in addresses:
                raise ConfigError(_CONTEXT, f"the stage {LOCAL!r} needs it; pass it with -c {key}=URL", key)
            if not is_address(addresses[key]):
                raise ConfigError(_CONTEXT, f"{addresses[key]!r} is no http(s) address", key)
        return cls(
            name=name,
            models=models,
            facts=msgspec.structs.replace(
                StageFacts(workflows=facts.workflows),
                label_studio_url=addresses["label_studio_url"],
                mlflow=addresses["mlflow_url"],
            ),
            sagemaker_endpoint=addresses["sagemaker_endpoint"],
        )

    @cached_property
    def configs(self) -> list[ModelConfig]:
        """The config of every model, each checked against its label config."""
        return [folder.config for folder in self.models.checked()]

    @property
    def predict_ready(self) -> int:
        """How many of predict's environments are kept ready."""
        return self.facts.predict_start if isinstance(self.facts.predict_start, int) else 0

    @property
    def label_studio_url(self) -> str | None:
        """Of the stage's own server or the one that it names, without a slash at its end."""
        if self.facts.label_studio:
            return f"https://{self.facts.label_studio.domain}"
        return self.facts.label_studio_url.rstrip("/") if self.facts.label_studio_url else None

    @property
    def schedule(self) -> cdk.Duration:
        """How late a lost webhook is made up for, at most. Each look wakes the database of a Label Studio of the stage's own."""
        return cdk.Duration.hours(1) if self.facts.label_studio else cdk.Duration.minutes(5)

    @property
    def mlflow_url(self) -> str | None:
        """Without a slash at its end; None where a serverless MLflow App is made."""
        return None if self.facts.mlflow == "app" else self.facts.mlflow.rstrip("/")

    @property
    def log_retention(self) -> logs.RetentionDays:
        """How long every log group keeps what it has."""
        days = logs.RetentionDays
        return {
            7: days.ONE_WEEK,
            14: days.TWO_WEEKS,
            30: days.ONE_MONTH,
            90: days.THREE_MONTHS,
            180: days.SIX_MONTHS,
            365: days.ONE_YEAR,
        }[self.facts.retention.log_days]

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
    def mlflow_secret(self) -> str | None:
        """The secret with the token of an MLflow server; None where MLflow is an App, or a laptop's."""
        return f"labelloop/{self.name}/mlflow" if self.mlflow_url and not self.is_local else None

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

    @property
    def label_studio_environment(self) -> dict[str, str]:
        """Without an address `labelloop.settings` says at run time what is missing; synth has warned."""
        url = {"LABELLOOP_LABEL_STUDIO_URL": self.label_studio_url} if self.label_studio_url else {}
        return {**url, "LABELLOOP_LABEL_STUDIO_SECRET": self.label_studio_secret}

    def mlflow_environment(self, tracking_uri: str) -> dict[str, str]:
        secret = {"LABELLOOP_MLFLOW_SECRET": self.mlflow_secret} if self.mlflow_secret else {}
        return {"LABELLOOP_MLFLOW_TRACKING_URI": tracking_uri, **secret}

    @property
    def network_environment(self) -> dict[str, str]:
        """Tells `retrain` where training jobs run."""
        network = self.facts.training_network
        if network is None:
            return {}
        return {
            "LABELLOOP_TRAINING_SUBNETS": ",".join(network.subnets),
            "LABELLOOP_TRAINING_SECURITY_GROUPS": ",".join(network.security_groups),
        }

    # What follows, and nothing else, differs on a laptop.

    @property
    def is_local(self) -> bool:
        return self.name == LOCAL

    @property
    def env(self) -> cdk.Environment:
        """The emulator's account and region; on AWS the stage's, or those of the caller's credentials."""
        if self.is_local:
            return cdk.Environment(account="000000000000", region="us-east-1")
        return cdk.Environment(
            account=self.facts.account or os.environ.get("CDK_DEFAULT_ACCOUNT"),
            region=self.facts.region or os.environ.get("CDK_DEFAULT_REGION"),
        )

    @property
    def training_event_sources(self) -> list[str]:
        """Who says that a training job has ended. The emulator refuses events in the name of AWS, as AWS does."""
        return ["aws.sagemaker", "labelloop.sagemaker"] if self.is_local else ["aws.sagemaker"]

    @property
    def serves_versions(self) -> bool:
        """Whether the API calls predict's alias `live`, which moves from version to version. The emulator has no CodeDeploy."""
        return not self.is_local

    @property
    def saves_queries(self) -> bool:
        """The emulator does not know AWS::Logs::QueryDefinition."""
        return not self.is_local

    @property
    def sagemaker_environment(self) -> dict[str, str]:
        """Leads SageMaker's client to the stand-in; the emulator has no SageMaker."""
        return {"AWS_ENDPOINT_URL_SAGEMAKER": self.sagemaker_endpoint} if self.sagemaker_endpoint else {}


def output(stack: cdk.Stack, key: str, value: str) -> None:
    """An output by its exact key: the CLI finds a deployment by them (docs/architecture.md lists all)."""
    cdk.CfnOutput(stack, f"{key}Output", value=value).override_logical_id(key)
