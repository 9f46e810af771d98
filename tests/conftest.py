"""What all tests share: no real AWS account is ever in reach, and one emulator a session for those that need AWS."""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import boto3
import pytest

from labelloop.artifacts import Bucket
from labelloop.ledger import Ledger
from local import emulator, processes
from local.environment import LOOPBACK, aws_environment, clean_environment
from local.toolchain import find_uv

pytest_plugins = ["tests.laptop"]  # the whole stack, for tests/loop and tests/browser

# Before anything starts threads of its own: torch and numpy spin on every core.
os.environ.update({"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"})

# Until a test asks for the emulator, AWS is a closed port of this machine.
for _name in [name for name in os.environ if name.startswith(("AWS_", "LABELLOOP_")) and name != "LABELLOOP_CACHE"]:
    del os.environ[_name]
os.environ.update(aws_environment(f"http://{LOOPBACK}:9"))


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What one process runs, where tests are shared out to several: what uses one stack, one folder, or one file of the rest."""
    for item in items:
        folder, _, file = item.path.relative_to(item.config.rootpath / "tests").as_posix().partition("/")
        own_process = "laptop" if "running_loop" in getattr(item, "fixturenames", ()) else folder
        if folder in ("unit", "browser") and own_process != "laptop":
            own_process = file
        item.add_marker(pytest.mark.xdist_group(own_process))


@pytest.fixture(scope="session")
def aws(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an AWS emulator of our own; the environment makes every client use it."""
    folder = tmp_path_factory.mktemp("aws")
    port = processes.free_port()
    endpoint = f"http://{LOOPBACK}:{port}"
    started = processes.start(
        "emulator",
        emulator.command(find_uv(), sys.executable),
        log=folder / "emulator.log",
        environment={**clean_environment(), **emulator.environment(port, folder, folder / "functions")},
    )
    try:
        processes.wait_until_ready(started, lambda: processes.answers(endpoint + emulator.READY_PATH), limit_s=120)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in aws_environment(endpoint).items():
                patch.setenv(name, value)
            yield endpoint
    finally:
        processes.stop([started.record], grace_s=5)


@pytest.fixture
def new_bucket(aws: str) -> Callable[[], Bucket]:
    """Makes empty buckets."""
    s3: Any = boto3.client("s3")

    def make() -> Bucket:
        name = f"test-{uuid.uuid4().hex}"
        s3.create_bucket(Bucket=name)
        return Bucket(name)

    return make


@pytest.fixture
def bucket(new_bucket: Callable[[], Bucket]) -> Bucket:
    return new_bucket()


@pytest.fixture
def ledger_table(aws: str) -> str:
    """The name of an empty ledger table."""
    name = f"test-{uuid.uuid4().hex}"
    dynamodb: Any = boto3.client("dynamodb")
    dynamodb.create_table(
        TableName=name,
        KeySchema=[{"AttributeName": "model", "KeyType": "HASH"}, {"AttributeName": "record", "KeyType": "RANGE"}],
        AttributeDefinitions=[{"AttributeName": key, "AttributeType": "S"} for key in ("model", "record")],
        BillingMode="PAY_PER_REQUEST",
    )
    return name


@pytest.fixture
def ledger(ledger_table: str) -> Ledger:
    return Ledger(ledger_table)
