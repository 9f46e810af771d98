"""DynamoDB, S3, SageMaker and MLflow in memory, as far as the retraining loop uses them, for tests of what goes wrong between.

Each keeps the promises that the loop rests on: conditional writes, compare-and-set, job names that are unique for ever. All
else that a real service does is missing; what is not understood is an error.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

from botocore.exceptions import ClientError

from labelloop.errors import ConflictError

Item = dict[str, Any]


def refusal(operation: str, code: str, message: str = "", **response: Any) -> ClientError:
    """What a boto3 client raises."""
    answer: Any = {"Error": {"Code": code, "Message": message}, **response}
    return ClientError(answer, operation)


@dataclass
class FakeDynamoDB:
    """boto3's client of DynamoDB with the ledger's table (key `model`, `record`) and its conditions on what the loop writes."""

    items: dict[tuple[str, str], Item] = field(default_factory=dict)
    lock: Any = field(default_factory=Lock)

    def get_item(self, *, TableName: str, Key: Item, ConsistentRead: bool) -> dict[str, Any]:
        item = self.items.get(_key(Key))
        return {} if item is None else {"Item": dict(item)}

    def put_item(self, *, TableName: str, Item: Item, **condition: Any) -> dict[str, Any]:
        with self.lock:
            if not self._is_met({"Item": Item, **condition}):
                raise refusal("PutItem", "ConditionalCheckFailedException")
            self.items[_key(Item)] = dict(Item)
        return {}

    def query(
        self,
        *,
        TableName: str,
        KeyConditionExpression: str,
        ExpressionAttributeNames: dict[str, str],
        ExpressionAttributeValues: Item,
        ConsistentRead: bool,
        ExclusiveStartKey: Item | None = None,
    ) -> dict[str, Any]:
        """At most two items an answer, as the real one answers a megabyte."""
        if KeyConditionExpression != "#model = :model AND begins_with(#record, :prefix)":
            raise NotImplementedError(KeyConditionExpression)
        model, prefix = (ExpressionAttributeValues[name]["S"] for name in (":model", ":prefix"))
        after = _key(ExclusiveStartKey) if ExclusiveStartKey else ("", "")
        found = sorted(key for key in self.items if key[0] == model and key[1].startswith(prefix) and key > after)
        answer: dict[str, Any] = {"Items": [dict(self.items[key]) for key in found[:2]]}
        if found[2:]:
            answer["LastEvaluatedKey"] = {"model": {"S": model}, "record": {"S": found[1][1]}}
        return answer

    def transact_write_items(self, *, TransactItems: list[dict[str, Any]]) -> dict[str, Any]:
        """All puts or none."""
        puts = [entry["Put"] for entry in TransactItems]
        with self.lock:
            met = [self._is_met(put) for put in puts]
            if not all(met):
                reasons = [{"Code": "None" if one else "ConditionalCheckFailed"} for one in met]
                raise refusal("TransactWriteItems", "TransactionCanceledException", CancellationReasons=reasons)
            for put in puts:
                self.items[_key(put["Item"])] = dict(put["Item"])
        return {}

    def _is_met(self, put: dict[str, Any]) -> bool:
        there = self.items.get(_key(put["Item"]))
        match put.get("ConditionExpression"):
            case None:
                return True
            case "attribute_not_exists(#record)":
                return there is None
            case "attribute_exists(#record) AND attribute_not_exists(#scored)":
                return there is not None and "scored" not in there
            case "#verdict = :shadow":
                return there is not None and there.get("verdict") == put["ExpressionAttributeValues"][":shadow"]
            case "#sequence = :sequence":
                return there is not None and there.get("sequence") == put["ExpressionAttributeValues"][":sequence"]
            case other:
                raise NotImplementedError(other)


def _key(item: Item) -> tuple[str, str]:
    return item["model"]["S"], item["record"]["S"]


@dataclass
class FakeBucket:
    """`artifacts.Bucket` in memory, without listings. An object's entity tag is its MD5, as S3's is."""

    name: str = "artifacts"
    objects: dict[str, bytes] = field(default_factory=dict)

    def get(self, key: str) -> bytes | None:
        return self.objects.get(key)

    def get_tagged(self, key: str) -> tuple[bytes, str | None] | None:
        data = self.objects.get(key)
        return None if data is None else (data, _e_tag(data))

    def put(self, key: str, data: bytes) -> None:
        self.objects[key] = data

    def put_if(self, key: str, data: bytes, *, tag: str | None) -> None:
        there = self.objects.get(key)
        if (None if there is None else _e_tag(there)) != tag:
            raise ConflictError(f"s3://{self.name}/{key} was changed by somebody else")
        self.put(key, data)

    def download(self, key: str, file: Path) -> str | None:
        found = self.get_tagged(key)
        if found is None:
            return None
        file.write_bytes(found[0])
        return found[1]

    def upload(self, key: str, file: Path) -> None:
        self.put(key, file.read_bytes())

    def upload_if(self, key: str, file: Path, *, tag: str | None) -> None:
        self.put_if(key, file.read_bytes(), tag=tag)

    def keys(self, prefix: str) -> list[str]:
        return sorted(key for key in self.objects if key.startswith(prefix))


def _e_tag(data: bytes) -> str:
    return f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"'


@dataclass
class TrainingJob:
    """One job: what was asked for and what became of it."""

    request: dict[str, Any]
    status: str = "InProgress"
    failure: str | None = None

    @property
    def ended(self) -> bool:
        return self.status in ("Completed", "Failed", "Stopped")


@dataclass
class FakeSageMaker:
    """boto3's client of SageMaker. `refuses` is the code of the error with which it takes no new job."""

    jobs: dict[str, TrainingJob] = field(default_factory=dict)
    refuses: str | None = None

    def create_training_job(self, **request: Any) -> dict[str, Any]:
        name = request["TrainingJobName"]
        if name in self.jobs:
            raise refusal("CreateTrainingJob", "ResourceInUse", "Job name must be unique within an AWS account and region")
        if self.refuses:
            raise refusal("CreateTrainingJob", self.refuses)
        self.jobs[name] = TrainingJob(request)
        return {"TrainingJobArn": f"arn:aws:sagemaker:us-east-1:000000000000:training-job/{name}"}

    def describe_training_job(self, *, TrainingJobName: str) -> dict[str, Any]:
        job = self.jobs.get(TrainingJobName)
        if job is None:
            raise refusal("DescribeTrainingJob", "ValidationException", "Requested resource not found.")
        reason = {} if job.failure is None else {"FailureReason": job.failure}
        return {"TrainingJobName": TrainingJobName, "TrainingJobStatus": job.status, **reason}


@dataclass
class FakeRegistry:
    """`registry.Registry` in memory."""

    aliases: dict[str, int] = field(default_factory=dict)
    tags: dict[int, dict[str, str]] = field(default_factory=dict)

    def set_alias(self, model: str, alias: str, version: int) -> None:
        self.aliases[alias] = version

    def tag(self, model: str, version: int, tags: dict[str, str]) -> None:
        self.tags.setdefault(version, {}).update(tags)


class Wired:
    """A service with a wire to it: each call of one of its methods goes through `wire(call)`, which may do it, or not, or die."""

    def __init__(self, service: Any, wire: Callable[[Callable[[], Any]], Any]) -> None:
        self._service, self._wire = service, wire

    def __getattr__(self, name: str) -> Any:
        member = getattr(self._service, name)
        if not callable(member):
            return member
        return lambda *args, **kwargs: self._wire(partial(member, *args, **kwargs))
