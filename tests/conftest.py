"""What all tests share: no real AWS account is ever in reach, and one emulator a session for those that need AWS."""

from __future__ import annotations

import os
import signal
import sys
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import boto3
import hypothesis
import msgspec
import pytest
from xdist.scheduler import LoadScopeScheduling

from labelloop.artifacts import Bucket
from labelloop.ledger import Ledger
from labelloop.records import Record
from local import emulator, processes
from local.environment import LOOPBACK, aws_environment, clean_environment
from local.toolchain import find_uv

pytest_plugins = ["tests.laptop"]  # the whole stack, for tests/loop and tests/browser

# The tests of the fixture `loop`, which share one stack.
USES_THE_LAPTOP = ("tests/loop/", "tests/browser/test_open_task.py", "tests/browser/test_pre_annotation.py")

# Before anything starts threads of its own: torch and numpy spin on every core.
os.environ.update({"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"})

# A busy machine makes no example a wrong one: Hypothesis' own limit is 200 ms, which the first call of torch alone may take.
hypothesis.settings.register_profile("untimed", hypothesis.settings.default, deadline=None)
hypothesis.settings.load_profile("untimed")

# A shell that runs the tests in the background has them ignore Ctrl-C, and all that they start as well; some tests press it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Until a test asks for the emulator, AWS is a closed port of this machine.
for _name in [name for name in os.environ if name.startswith(("AWS_", "LABELLOOP_")) and name != "LABELLOOP_CACHE"]:
    del os.environ[_name]
os.environ.update(aws_environment(f"http://{LOOPBACK}:9"))


# msgspec crashes where two threads meet a type for the first time; functions read records in one thread, some tests in eight.
for _kind in Record.__subclasses__():
    msgspec.json.Decoder(_kind)


class ByStack(LoadScopeScheduling):  # type: ignore[misc]  # it comes without types
    """Shares tests out to processes so that what uses one stack of servers stays in one process, and so does each other file.

    pytest-xdist has marks for this, which its 3.8.0 loses with pytest 9.2.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "laptop" if file.startswith(USES_THE_LAPTOP) else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByStack:
    return ByStack(config, log)


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
    return new_ledger_table()


def new_ledger_table() -> str:
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
