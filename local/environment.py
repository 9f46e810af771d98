"""The environment variables that a part of the laptop stack starts with: the user's, without what could lead it astray."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import boto3
import botocore.session
from botocore.config import Config
from obstore.store import S3Store

REGION = "us-east-1"
ACCOUNT = "000000000000"
LOOPBACK = "127.0.0.1"

# Prefixes of what would reach a real account, another server, or another Python's packages.
_DROPPED = (
    "AWS_",
    "CDK_",
    "DJANGO_",
    "EDGE_PORT",
    "GATEWAY_PORT",
    "JSII_",
    "LABELLOOP_",
    "LABEL_STUDIO_",
    "LOCALSTACK_",
    "MINISTACK_",
    "MLFLOW_",
    "NODE_OPTIONS",
    "NODE_PATH",
    "PYTHONHOME",
    "PYTHONPATH",
    "PYTHONSAFEPATH",
    "PYTHONSTARTUP",
    "UV_PROJECT",
    "UV_PYTHON",
    "UV_WORKING_DIR",
    "VIRTUAL_ENV",
)


def clean_environment() -> dict[str, str]:
    """The user's environment without AWS accounts, other servers and Python paths; loopback is reached without a proxy."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_DROPPED)}
    unproxied = ",".join(filter(None, [kept.get("NO_PROXY", kept.get("no_proxy", "")), LOOPBACK, "localhost"]))
    return {**kept, "NO_PROXY": unproxied, "no_proxy": unproxied, "PYTHONUNBUFFERED": "1"}


def aws_environment(endpoint: str, *, sagemaker: str | None = None) -> Mapping[str, str]:
    """What makes any AWS client talk to the emulator at `endpoint`, and to nothing else."""
    environment = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": REGION,
        "AWS_DEFAULT_REGION": REGION,
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,  # the user's profiles may name an account, a role or an endpoint
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }
    return environment | ({"AWS_ENDPOINT_URL_SAGEMAKER": sagemaker} if sagemaker else {})


def aws_client(service: str, endpoint: str, options: Config | None = None) -> Any:
    """A boto3 client of the emulator at `endpoint`, whatever profiles and settings the user has."""
    nothing: dict[str, Any] = {"profile": (None, None, None, None), "config_file": (None, None, os.devnull, None)}
    session: Any = boto3.Session(botocore_session=botocore.session.Session(session_vars=nothing), region_name=REGION)
    return session.client(
        service,
        endpoint_url=endpoint,
        aws_access_key_id="test",
        aws_secret_access_key="test",  # noqa: S106
        config=Config(proxies={}).merge(options or Config()),
    )


def s3_store(bucket: str, endpoint: str) -> S3Store:
    """A bucket of the emulator at `endpoint` for reading many objects: a seventh of the time that boto3's downloads take."""
    return S3Store(
        bucket,
        endpoint=endpoint,
        region=REGION,
        access_key_id="test",
        secret_access_key="test",  # noqa: S106
        client_options={"allow_http": True, "timeout": "5m"},
        retry_config={"max_retries": 3},
    )
