"""The secrets of a deployment, and who may read which."""

from __future__ import annotations

import json

import aws_cdk as cdk
from aws_cdk import aws_iam as iam
from aws_cdk import aws_secretsmanager as secretsmanager
from constructs import Construct

from infra_cdk.constructs.grants import allow
from infra_cdk.nag import acknowledge
from infra_cdk.stage import Stage

_TOKEN = 40  # characters of a legacy token
_PLACEHOLDER = "not filled in yet: put a token of Label Studio here"


class Secrets(Construct):
    """Tokens of Label Studio and of an MLflow server, filled in after the first deploy; each backend's generated password.

    Where the stage deploys Label Studio itself, its token is generated: it takes it at its first start.
    """

    def __init__(self, scope: Construct, id: str, *, stage: Stage) -> None:
        super().__init__(scope, id)
        deployed = stage.facts.label_studio is not None
        self.label_studio = secretsmanager.Secret(
            self,
            "LabelStudio",
            secret_name=stage.label_studio_secret,
            description="Token that labelloop signs in to Label Studio with: a legacy token or a personal access token",
            secret_object_value=None if deployed else {"token": cdk.SecretValue.unsafe_plain_text(_PLACEHOLDER)},
            generate_secret_string=secretsmanager.SecretStringGenerator(
                secret_string_template=json.dumps({}),
                generate_string_key="token",
                password_length=_TOKEN,
                exclude_punctuation=True,
            )
            if deployed
            else None,
            removal_policy=cdk.RemovalPolicy.RETAIN_ON_UPDATE_OR_DELETE,
        )
        acknowledge(self.label_studio, SMG4="Label Studio issues the token; Secrets Manager cannot rotate it")
        if stage.mlflow_secret:
            mlflow = secretsmanager.Secret(
                self,
                "Mlflow",
                secret_name=stage.mlflow_secret,
                description="Token that labelloop signs in to the MLflow server with; empty where it asks for none",
                secret_object_value={"token": cdk.SecretValue.unsafe_plain_text("")},
                removal_policy=cdk.RemovalPolicy.RETAIN_ON_UPDATE_OR_DELETE,
            )
            acknowledge(mlflow, SMG4="the MLflow server issues the token; Secrets Manager cannot rotate it")
        for config in stage.configs:
            backend = secretsmanager.Secret(
                self,
                f"Backend-{config.name}",
                secret_name=f"{stage.backend_secret_prefix}{config.name}",
                description=f"Basic credentials with which Label Studio calls the backend of {config.name}",
                generate_secret_string=secretsmanager.SecretStringGenerator(
                    secret_string_template=json.dumps({"username": config.name}),
                    generate_string_key="password",
                    password_length=40,
                    exclude_punctuation=True,  # a colon or a quote is at the mercy of every client's Basic auth
                ),
                removal_policy=cdk.RemovalPolicy.RETAIN_ON_UPDATE_OR_DELETE,
            )
            acknowledge(
                backend, SMG4="Label Studio holds a copy; `labelloop rotate-secrets` changes both, AWS's rotation could not"
            )


def allow_reading_label_studio_secret(role: iam.Role, *, stage: Stage) -> None:
    _allow_reading(role, f"{stage.label_studio_secret}-??????")  # Secrets Manager appends six characters


def allow_reading_mlflow_secret(role: iam.Role, *, stage: Stage) -> None:
    """Nothing where there is none."""
    if stage.mlflow_secret:
        _allow_reading(role, f"{stage.mlflow_secret}-??????")


def allow_reading_backend_secrets(role: iam.Role, *, stage: Stage) -> None:
    """The credentials of every model, those of models added later too."""
    _allow_reading(role, f"{stage.backend_secret_prefix}*", wildcard="the credentials of every model of the stage")


def _allow_reading(role: iam.Role, name: str, *, wildcard: str | None = None) -> None:
    arn = cdk.Stack.of(role).format_arn(
        service="secretsmanager", resource="secret", resource_name=name, arn_format=cdk.ArnFormat.COLON_RESOURCE_NAME
    )
    allow(role, "secretsmanager:GetSecretValue", on=arn, wildcard=wildcard)
