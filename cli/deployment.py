"""A deployed stage, as the commands see it: everything is found from the outputs of its three stacks."""

from __future__ import annotations

import base64
import json
import os
import shlex
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import boto3
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError
from obstore.auth.boto3 import Boto3CredentialProvider

from infra_cdk.stage_facts import LOCAL, read_facts
from labelloop.artifacts import Bucket, Champions
from labelloop.errors import NotSetUpError, ServiceError, SettingsError
from labelloop.label_studio.client import LabelStudioClient
from labelloop.ledger import Ledger
from labelloop.registry import Registry
from labelloop.secrets import MlflowToken
from local.stack import Addresses, LaptopStack

LAPTOP = Path(".labelloop/laptop")  # `labelloop up`
DEMO = Path(".labelloop/demo")  # `labelloop demo`


@dataclass(frozen=True)
class BackendAccess:
    """Where Label Studio reaches a model's backend and what it signs in with."""

    url: str
    user: str
    password: str = field(repr=False)

    @property
    def authorization(self) -> str:
        return "Basic " + base64.b64encode(f"{self.user}:{self.password}".encode()).decode()


class Deployment:
    """One deployed stage. `laptop` holds the addresses of a laptop's stack; on AWS there are none."""

    def __init__(self, stage: str, laptop: Addresses | None = None) -> None:
        self.stage, self.laptop = stage, laptop

    @classmethod
    def find(cls, stage: str, home: Path | None = None) -> Deployment:
        """The stage of this name, in its region; for `local` the stack that runs in `home`, or in either usual place."""
        if stage != LOCAL:
            if region := read_facts(stage).region:
                os.environ.update(AWS_REGION=region, AWS_DEFAULT_REGION=region)
            return cls(stage)
        for place in [home] if home else [LAPTOP, DEMO]:
            addresses = LaptopStack.running(place)
            if addresses:
                return cls.on_laptop(addresses)
        where = f"in {home}" if home else "on this laptop"
        up = f"labelloop up{home_option(home or LAPTOP)}"
        raise SettingsError(f"no stack runs {where}; start one with: {up} (or name a stage: --stage dev)")

    @classmethod
    def on_laptop(cls, addresses: Addresses) -> Deployment:
        """A laptop's stack. From here on this process talks to its emulator and to no AWS account."""
        addresses.use()
        return cls(addresses.stage, addresses)

    @cached_property
    def outputs(self) -> dict[str, str]:
        """The outputs of the stage's stacks, by key. Raises `NotSetUpError` when it is not deployed."""
        try:
            cloudformation = boto3.client("cloudformation")
        except BotoCoreError as error:  # no region, no such profile
            raise SettingsError(f"AWS is not configured: {error}") from error
        found: dict[str, str] = {}
        for part in ("state", "training", "serving"):
            name = f"labelloop-{self.stage}-{part}"
            try:
                stack = cloudformation.describe_stacks(StackName=name)["Stacks"][0]
            except ClientError as error:
                if error.response["Error"]["Code"] == "ValidationError":
                    raise NotSetUpError(f"the stack {name} does not exist; run: {self.deploy_command}") from None
                raise ServiceError(f"CloudFormation refused: {error}") from error
            except NoCredentialsError as error:
                raise SettingsError(f"AWS is not configured: {error}") from error
            except BotoCoreError as error:
                raise ServiceError(f"AWS does not answer: {error}") from error
            found.update({output["OutputKey"]: output["OutputValue"] for output in stack.get("Outputs", [])})
        return found

    def bucket(self, name: str) -> Bucket:
        return Bucket(name, credential_provider=Boto3CredentialProvider())

    @cached_property
    def images(self) -> Bucket:
        return self.bucket(self.outputs["ImagesBucket"])

    @cached_property
    def artifacts(self) -> Bucket:
        return self.bucket(self.outputs["ArtifactsBucket"])

    @cached_property
    def champions(self) -> Champions:
        return Champions(self.artifacts)

    @cached_property
    def ledger(self) -> Ledger:
        return Ledger(self.outputs["LedgerTable"])

    @property
    def mlflow_tracking_uri(self) -> str:
        return self.outputs["MlflowTrackingUri"]

    @cached_property
    def registry(self) -> Registry:
        """MLflow; a server of one's own with the token that lies in the stage's secret."""
        own = not self.laptop and not self.mlflow_tracking_uri.startswith("arn:")
        return Registry(self.mlflow_tracking_uri, MlflowToken(f"labelloop/{self.stage}/mlflow") if own else None)

    @property
    def label_studio_url(self) -> str:
        url = self.outputs.get("LabelStudioUrl")
        if not url:
            raise NotSetUpError(f"the stage {self.stage} has no Label Studio; name it in stages.yaml and deploy")
        return url.rstrip("/")

    @cached_property
    def label_studio_token(self) -> str:
        token = self._secret(self.outputs["LabelStudioSecret"]).get("token")
        if not token:
            raise NotSetUpError(f"the secret {self.outputs['LabelStudioSecret']} holds no Label Studio token yet")
        return token

    @cached_property
    def label_studio(self) -> LabelStudioClient:
        return LabelStudioClient(self.label_studio_url, self.label_studio_token)

    def backend_secret(self, model: str) -> str:
        """The name of the secret with the credentials of a model's backend."""
        return f"labelloop/{self.stage}/backend/{model}"

    @property
    def deploy_command(self) -> str:
        """What a person runs to deploy the stage as the code has it now."""
        return self.command("up") if self.laptop else f"cdk deploy --all -c stage={self.stage}"

    def command(self, words: str) -> str:
        """The labelloop command of these words for this stage, as a person types it."""
        return f"labelloop {words}{home_option(self.laptop.home) if self.laptop else f' --stage {self.stage}'}"

    def backend_url(self, model: str) -> str:
        """Where a model's backend is. On the laptop its address differs from the stack's output, which names AWS."""
        api = self.laptop.api if self.laptop else self.outputs["ApiUrl"].rstrip("/")
        return f"{api}/{model}"

    def backend(self, model: str) -> BackendAccess:
        """The backend of a model. Raises `NotSetUpError` when it is not deployed."""
        secret = self._secret(self.backend_secret(model), missing=f"{model} is not deployed yet; run: {self.deploy_command}")
        return BackendAccess(url=self.backend_url(model), user=secret["username"], password=secret["password"])

    def _secret(self, name: str, missing: str = "") -> dict[str, str]:
        """What a secret holds. `missing` says what it means that there is none."""
        try:
            value = boto3.client("secretsmanager").get_secret_value(SecretId=name)["SecretString"]
            secret: dict[str, str] = json.loads(value)
        except ClientError as error:
            if missing and error.response["Error"]["Code"] == "ResourceNotFoundException":
                raise NotSetUpError(missing) from None
            raise NotSetUpError(f"cannot read the secret {name}: {error.response['Error'].get('Message', error)}") from error
        except BotoCoreError as error:
            raise ServiceError(f"Secrets Manager does not answer: {error}") from error
        except ValueError as error:
            raise NotSetUpError(f"the secret {name} holds no JSON") from error
        return secret


def home_option(home: Path) -> str:
    """What a command is told to reach the stack that is kept in `home`; nothing for the usual place."""
    return "" if home.absolute() == LAPTOP.absolute() else f" --home {shlex.quote(str(home))}"


def addresses_to_show(addresses: Addresses) -> list[str]:
    """Where a person looks, and how to sign in."""
    return [
        f"Label Studio    {addresses.label_studio}",
        f"  sign in as    {addresses.label_studio_user}  password {addresses.label_studio_password}",
        f"MLflow          {addresses.mlflow}",
    ]
