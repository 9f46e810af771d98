"""The ledger: what was trained, what is running, which images are tasks. One DynamoDB table, conditional writes only.

Writing a head demands the sequence number that was read, so two reconciles at once cannot both start a training.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import msgspec
from botocore.exceptions import BotoCoreError, ClientError

from labelloop import aws
from labelloop.errors import ConflictError, NotSetUpError, StorageError
from labelloop.records import (
    Answer,
    Audit,
    Drift,
    Erasure,
    Head,
    Job,
    LeftOut,
    NothingNew,
    Promotion,
    Record,
    ReviewCase,
    ShadowPair,
    Takeover,
    Training,
    TurnedOff,
)

_LEASE_SECONDS = 90  # longer than ingest may run
_TRIES = 8  # of a change that others make, too
_BATCH = 25  # DynamoDB's limit of a BatchWriteItem
_LAST_ENTRY = 10**10 - 1  # of a log whose numbers have ten digits


@dataclass(frozen=True)
class ImageClaim:
    """The answer to a claim of an image.

    `new`: it is yours. `retry`: it is yours, but somebody died with it, perhaps after making the task under the address
    `before`. `done`: it has a task. `busy`: somebody is at it now.
    """

    state: Literal["new", "retry", "done", "busy"]
    before: str | None = None


class _OfAnImage(msgspec.Struct):
    """Of a record: whose image it is about."""

    sha256: str


class Ledger:
    """The ledger table. Methods raise `StorageError` when DynamoDB does not do its part."""

    def __init__(self, table: str, client: Any = None) -> None:
        self._table = table
        self._client = client or aws.client("dynamodb")

    # Label Studio's project

    def project(self, model: str) -> int:
        """The model's Label Studio project. Raises `NotSetUpError`."""
        item = self._get(model, "project")
        if item is None:
            raise NotSetUpError(f"{model} has no Label Studio project yet; run: labelloop setup-label-studio-project {model}")
        return int(item["project"]["N"])

    def set_project(self, model: str, project: int) -> None:
        self._call("put_item", Item={**_key(model, "project"), "project": {"N": str(project)}})

    # Trainings

    def head(self, model: str) -> Head:
        item = self._get(model, "head")
        return Head(model=model) if item is None else msgspec.json.decode(item["body"]["S"], type=Head)

    def claim(self, head: Head, job: Job) -> Head:
        """Record that `job` is the model's running training. Raises `ConflictError` when the head has changed meanwhile."""
        claimed = msgspec.structs.replace(head, sequence=head.sequence + 1, running=job, asked=False, nothing_new=None)
        self._advance(head, claimed, Training(job=job, status="running"))
        return claimed

    def finish(self, head: Head, after: Head, training: Training) -> Head:
        """Record how the running training ended. Raises `ConflictError` when the head has changed meanwhile."""
        after = msgspec.structs.replace(after, sequence=head.sequence + 1, running=None)
        self._advance(head, after, training)
        return after

    def remember(
        self, head: Head, *, asked: bool, left_out: LeftOut | None = None, nothing_new: NothingNew | None = None
    ) -> None:
        """Note whether a training is asked for, and why one that was due did not start. Raises `ConflictError`."""
        found = {"asked": asked, "left_out": left_out, "nothing_new": nothing_new}
        after = msgspec.structs.replace(head, sequence=head.sequence + 1, **found)
        self._advance(head, after, None)

    def trainings(self, model: str) -> list[Training]:
        """All trainings, the earliest first."""
        found = [msgspec.json.decode(item["body"]["S"], type=Training) for item in self._query(model, "training#")]
        return sorted(found, key=lambda training: training.job.started_at)

    def training(self, model: str, job_name: str) -> Training | None:
        item = self._get(model, f"training#{job_name}")
        return None if item is None else msgspec.json.decode(item["body"]["S"], type=Training)

    def record_promotion(self, promotion: Promotion) -> Promotion:
        """Note the decision about a job; the one that is noted, for the first stays."""
        written = self._put_if(_promotion_item(promotion), "attribute_not_exists(#record)", {"#record": "record"}, {})
        return promotion if written else self.promotion(promotion.model, promotion.job_name) or promotion

    def end_shadow(self, promotion: Promotion) -> Promotion:
        """Note how a run in shadow ended; the decision that is noted. The first end stays, unless this version serves now."""
        if promotion.verdict == "promote":
            self._call("put_item", Item=_promotion_item(promotion))
            return promotion
        item, names = _promotion_item(promotion), {"#verdict": "verdict"}
        written = self._put_if(item, "#verdict = :shadow", names, {":shadow": {"S": "shadow"}})
        return promotion if written else self.promotion(promotion.model, promotion.job_name) or promotion

    def promotions(self, model: str) -> dict[str, Promotion]:
        """Decisions by job name."""
        found = [msgspec.json.decode(item["body"]["S"], type=Promotion) for item in self._query(model, "promotion#")]
        return {promotion.job_name: promotion for promotion in found}

    def promotion(self, model: str, job_name: str) -> Promotion | None:
        item = self._get(model, f"promotion#{job_name}")
        return None if item is None else msgspec.json.decode(item["body"]["S"], type=Promotion)

    def record_takeover(self, takeover: Takeover) -> None:
        """Note a change of the champion pointer. Noting it again changes nothing."""
        self._call(
            "put_item",
            Item={**_key(takeover.model, f"takeover#{takeover.at}"), "body": {"S": msgspec.json.encode(takeover).decode()}},
        )

    def takeovers(self, model: str) -> list[Takeover]:
        """All of them, the earliest first."""
        found = [msgspec.json.decode(item["body"]["S"], type=Takeover) for item in self._query(model, "takeover#")]
        return sorted(found, key=lambda takeover: takeover.at)

    def record_answer(self, answer: Answer) -> None:
        self._put_body(answer.model, f"answer#{answer.request}", answer)

    def answer(self, model: str, request: str) -> Answer | None:
        """What came of a request for a training; None while nobody has looked at it."""
        item = self._get(model, f"answer#{request}")
        return None if item is None else msgspec.json.decode(item["body"]["S"], type=Answer)

    def recalled_at(self, model: str, job_name: str) -> str | None:
        """When `promote` was last asked to look at a job again; None when it never was."""
        item = self._get(model, f"recall#{job_name}")
        return None if item is None else str(item["at"]["S"])

    def note_recall(self, model: str, job_name: str, at: str) -> None:
        self._call("put_item", Item={**_key(model, f"recall#{job_name}"), "at": {"S": at}})

    # Images

    def claim_image(self, model: str, project: int, sha256: str, image: str) -> ImageClaim:
        """Claim the right to make a task of an image at the address `image`."""
        moment = time.time()
        try:
            answer = self._client.update_item(
                TableName=self._table,
                Key=_key(model, _image_record(project, sha256)),
                UpdateExpression="SET #state = :claimed, claimed_at = :now, image = :image",
                ConditionExpression="attribute_not_exists(#state) OR (#state = :claimed AND claimed_at < :expired)",
                ExpressionAttributeNames={"#state": "state"},
                ExpressionAttributeValues={
                    ":claimed": {"S": "claimed"},
                    ":now": {"N": f"{moment:.3f}"},
                    ":expired": {"N": f"{moment - _LEASE_SECONDS:.3f}"},
                    ":image": {"S": image},
                },
                ReturnValues="ALL_OLD",
            )
            before = answer.get("Attributes")
            return ImageClaim("retry", before["image"]["S"]) if before else ImageClaim("new")
        except ClientError as error:
            if error.response["Error"]["Code"] != "ConditionalCheckFailedException":
                raise StorageError(f"the ledger refused a claim: {error}") from error
        except BotoCoreError as error:
            raise StorageError(f"the ledger does not answer: {error}") from error
        return ImageClaim("done" if self.had_task(model, project, sha256) else "busy")

    def images_done(self, model: str, project: int, images: dict[str, str]) -> None:
        """Note that images (SHA-256 → address) have their tasks."""
        puts = [
            {
                "PutRequest": {
                    "Item": {**_key(model, _image_record(project, sha256)), "state": {"S": "done"}, "image": {"S": image}}
                }
            }
            for sha256, image in images.items()
        ]
        for start in range(0, len(puts), _BATCH):
            waiting = {self._table: puts[start : start + _BATCH]}
            for attempt in range(6):
                waiting = self._call("batch_write_item", RequestItems=waiting).get("UnprocessedItems") or {}
                if not waiting:
                    break
                time.sleep(0.05 * 2**attempt)
            else:
                raise StorageError("the ledger is throttled; the images will be noted with the next try")

    def had_task(self, model: str, project: int, sha256: str) -> bool:
        """Whether a task was made of an image, which may have been deleted in Label Studio since."""
        item = self._get(model, _image_record(project, sha256))
        return item is not None and item["state"]["S"] == "done"

    # Labels that are looked at again

    def review_cases(self, model: str, project: int) -> list[ReviewCase]:
        """All of a project, settled ones too."""
        return [msgspec.json.decode(item["body"]["S"], type=ReviewCase) for item in self._query(model, f"review#{project}#")]

    def record_review_case(self, case: ReviewCase) -> None:
        """Write a case; one image has one at most."""
        self._put_body(case.model, f"review#{case.project}#{case.sha256}", case)

    # Auto-accept

    def note_audits(self, audits: Sequence[Audit]) -> None:
        """Note tasks that are left to people; of one that is noted already nothing changes."""
        for audit in audits:
            self._put_if(
                {**_key(audit.model, _audit_record(audit)), **_body(audit)},
                "attribute_not_exists(#record)",
                {"#record": "record"},
                {},
            )

    def record_audit(self, audit: Audit) -> None:
        """Write what came of an audit."""
        self._put_body(audit.model, _audit_record(audit), audit)

    def audits(self, model: str, version: int) -> list[Audit]:
        return [msgspec.json.decode(item["body"]["S"], type=Audit) for item in self._query(model, f"audit#{version}#")]

    def claim_audit_look(self, model: str, version: int, seconds: float) -> bool:
        """Claim to compare a version's audits with people's answers; False where somebody did less than `seconds` ago."""
        moment = time.time()
        return self._put_if(
            {**_key(model, f"audit_look#{version}"), "looked_at": {"N": f"{moment:.3f}"}},
            "attribute_not_exists(#looked_at) OR #looked_at <= :expired",
            {"#looked_at": "looked_at"},
            {":expired": {"N": f"{moment - seconds:.3f}"}},
        )

    def turn_off(self, off: TurnedOff) -> None:
        """Note that auto-accept is off for a version. The first note stays."""
        self._put_if(
            {**_key(off.model, f"auto_accept_off#{off.version}"), **_body(off)},
            "attribute_not_exists(#record)",
            {"#record": "record"},
            {},
        )

    def turned_off(self, model: str, version: int) -> TurnedOff | None:
        item = self._get(model, f"auto_accept_off#{version}")
        return None if item is None else msgspec.json.decode(item["body"]["S"], type=TurnedOff)

    # Versions in shadow

    def note_pairs(self, pairs: Iterable[ShadowPair]) -> None:
        """Note what two versions said of tasks; of one that is noted already nothing changes."""
        for pair in pairs:
            item = {**_key(pair.model, _pair_record(pair)), **_body(pair)}
            self._put_if(item, "attribute_not_exists(#record)", {"#record": "record"}, {})

    def score_pair(self, pair: ShadowPair) -> None:
        """Note which of the two was right. The first note stays, and what was erased meanwhile does not come back."""
        item = {**_key(pair.model, _pair_record(pair)), **_body(pair), "scored": {"BOOL": True}}
        condition = "attribute_exists(#record) AND attribute_not_exists(#scored)"
        self._put_if(item, condition, {"#record": "record", "#scored": "scored"}, {})

    def pairs(self, model: str, version: int) -> list[ShadowPair]:
        """Of a version that runs, or ran, in shadow."""
        return [msgspec.json.decode(item["body"]["S"], type=ShadowPair) for item in self._query(model, f"shadow#{version}#")]

    # Drift

    def drift(self, model: str, version: int) -> Drift | None:
        """Of the images that a version predicts; None before the first."""
        return self._read_drift(model, version)[1]

    def change_drift(self, model: str, version: int, change: Callable[[Drift | None], Drift]) -> Drift:
        """Put what `change` makes of it in its place; what is there then. Raises `ConflictError`."""
        for _ in range(_TRIES):
            body, before = self._read_drift(model, version)
            after = change(before)
            item = {**_key(model, f"drift#{version}"), **_body(after)}
            new = ("attribute_not_exists(#body)", {}) if body is None else ("#body = :before", {":before": {"S": body}})
            if after == before or self._put_if(item, new[0], {"#body": "body"}, new[1]):
                return after
        raise ConflictError(f"the drift of {model} version {version} is changed by others all the time")

    def _read_drift(self, model: str, version: int) -> tuple[str | None, Drift | None]:
        item = self._get(model, f"drift#{version}")
        body = None if item is None else item["body"]["S"]
        return body, None if body is None else msgspec.json.decode(body, type=Drift)

    # Content groups

    def groups_after(self, model: str, project: int, sequence: int) -> list[tuple[int, bytes]]:
        """The entries of a project's log of groups after number `sequence`, in order, each with its number."""
        first, last = (_groups_record(project, number) for number in (sequence + 1, _LAST_ENTRY))
        items = self._query_where(model, "#record BETWEEN :first AND :last", {":first": {"S": first}, ":last": {"S": last}})
        return [(int(item["record"]["S"].rpartition("#")[2]), item["body"]["S"].encode()) for item in items]

    def append_groups(self, model: str, project: int, sequence: int, body: bytes) -> None:
        """Write entry `sequence` of the log, the one after the last that was read. Raises `ConflictError` when it is there."""
        try:
            self._client.put_item(
                TableName=self._table,
                Item={**_key(model, _groups_record(project, sequence)), "body": {"S": body.decode()}},
                ConditionExpression="attribute_not_exists(#record)",
                ExpressionAttributeNames={"#record": "record"},
            )
        except ClientError as error:
            if error.response["Error"]["Code"] == "ConditionalCheckFailedException":
                raise ConflictError(f"the groups of {model} have grown meanwhile") from error
            raise StorageError(f"the ledger refused groups: {error}") from error
        except BotoCoreError as error:
            raise StorageError(f"the ledger does not answer: {error}") from error

    def rewrite_groups(self, model: str, project: int, sequence: int, before: bytes, after: bytes) -> None:
        """Change entry `sequence` of the log, which is `before`. Raises `ConflictError` when it is not."""
        written = self._put_if(
            {**_key(model, _groups_record(project, sequence)), "body": {"S": after.decode()}},
            "#body = :before",
            {"#body": "body"},
            {":before": {"S": before.decode()}},
        )
        if not written:
            raise ConflictError(f"the groups of {model} were changed meanwhile")

    # Erasures

    def record_erasure(self, erasure: Erasure) -> None:
        """Write an erasure, or how far it has come."""
        self._put_body(erasure.model, f"erasure#{erasure.at}", erasure)

    def erasures(self, model: str) -> list[Erasure]:
        """All of them, the earliest first."""
        found = [msgspec.json.decode(item["body"]["S"], type=Erasure) for item in self._query(model, "erasure#")]
        return sorted(found, key=lambda erasure: erasure.at)

    def image_address(self, model: str, project: int, sha256: str) -> str | None:
        """The address under which an image became a task, if it did."""
        item = self._get(model, _image_record(project, sha256))
        return None if item is None else str(item["image"]["S"])

    def forget_images(self, model: str, project: int, images: Iterable[str]) -> int:
        """Delete what stands here of images (SHA-256): notes, cases for review, audits, pairs; how many records it was."""
        hashes = set(images)
        records = [record for sha256 in hashes for record in (_image_record(project, sha256), f"review#{project}#{sha256}")]
        for kind in ("audit#", "shadow#"):
            for item in self._query(model, kind):
                if msgspec.json.decode(item["body"]["S"], type=_OfAnImage).sha256 in hashes:
                    records.append(item["record"]["S"])
        for item in self._query(model, "drift#"):
            self.change_drift(model, int(item["record"]["S"].partition("#")[2]), partial(_without, hashes))
        there = [record for record in records if self._get(model, record)]
        for record in there:
            self._call("delete_item", Key=_key(model, record))
        return len(there)

    def _put_body(self, model: str, record: str, body: Record) -> None:
        self._call("put_item", Item={**_key(model, record), **_body(body)})

    def _put_if(self, item: dict[str, Any], condition: str, names: dict[str, str], values: dict[str, Any]) -> bool:
        """Write an item under a condition on the one that is there; whether it was met."""
        some_values: Any = {"ExpressionAttributeValues": values} if values else {}
        try:
            self._client.put_item(
                TableName=self._table, Item=item, ConditionExpression=condition, ExpressionAttributeNames=names, **some_values
            )
        except ClientError as error:
            if error.response["Error"]["Code"] == "ConditionalCheckFailedException":
                return False
            raise StorageError(f"the ledger refused put_item: {error}") from error
        except BotoCoreError as error:
            raise StorageError(f"the ledger does not answer: {error}") from error
        return True

    def _advance(self, before: Head, after: Head, training: Training | None) -> None:
        """Write the head, and a training with it, or nothing. Raises `ConflictError` when the head is no longer `before`."""
        head_item = {
            **_key(before.model, "head"),
            "sequence": {"N": str(after.sequence)},
            "body": {"S": msgspec.json.encode(after).decode()},
        }
        unchanged: dict[str, Any] = (
            {"ConditionExpression": "attribute_not_exists(#record)", "ExpressionAttributeNames": {"#record": "record"}}
            if before.sequence == 0
            else {
                "ConditionExpression": "#sequence = :sequence",
                "ExpressionAttributeNames": {"#sequence": "sequence"},
                "ExpressionAttributeValues": {":sequence": {"N": str(before.sequence)}},
            }
        )
        puts: Any = [{"Put": {"TableName": self._table, "Item": head_item, **unchanged}}]
        if training is not None:
            item = {
                **_key(before.model, f"training#{training.job.job_name}"),
                "body": {"S": msgspec.json.encode(training).decode()},
            }
            is_new = {"ConditionExpression": "attribute_not_exists(#record)", "ExpressionAttributeNames": {"#record": "record"}}
            puts.append({"Put": {"TableName": self._table, "Item": item, **(is_new if training.status == "running" else {})}})
        try:
            self._client.transact_write_items(TransactItems=puts)
        except ClientError as error:
            reasons = {reason.get("Code") for reason in error.response.get("CancellationReasons", [])}
            if reasons & {"ConditionalCheckFailed", "TransactionConflict"}:
                raise ConflictError(f"the ledger of {before.model} has changed meanwhile") from error
            raise StorageError(f"the ledger refused a change: {error}") from error
        except BotoCoreError as error:
            raise StorageError(f"the ledger does not answer: {error}") from error

    def _get(self, model: str, record: str) -> dict[str, Any] | None:
        item: dict[str, Any] | None = self._call("get_item", Key=_key(model, record), ConsistentRead=True).get("Item")
        return item

    def _query(self, model: str, prefix: str) -> list[dict[str, Any]]:
        return self._query_where(model, "begins_with(#record, :prefix)", {":prefix": {"S": prefix}})

    def _query_where(self, model: str, condition: str, values: dict[str, Any]) -> list[dict[str, Any]]:
        """The model's records that meet a condition on `#record`, in its order."""
        items: list[dict[str, Any]] = []
        start: dict[str, Any] = {}
        while True:
            answer = self._call(
                "query",
                KeyConditionExpression=f"#model = :model AND {condition}",
                ExpressionAttributeNames={"#model": "model", "#record": "record"},
                ExpressionAttributeValues={":model": {"S": model}, **values},
                ConsistentRead=True,
                **start,
            )
            items += answer["Items"]
            if "LastEvaluatedKey" not in answer:
                return items
            start = {"ExclusiveStartKey": answer["LastEvaluatedKey"]}

    def _call(self, operation: str, **arguments: Any) -> dict[str, Any]:
        table = {} if operation == "batch_write_item" else {"TableName": self._table}
        try:
            answer: dict[str, Any] = getattr(self._client, operation)(**table, **arguments)
            return answer
        except ClientError as error:
            raise StorageError(f"the ledger refused {operation}: {error}") from error
        except BotoCoreError as error:
            raise StorageError(f"the ledger does not answer: {error}") from error


def _key(model: str, record: str) -> dict[str, Any]:
    return {"model": {"S": model}, "record": {"S": record}}


def _groups_record(project: int, sequence: int) -> str:
    return f"groups#{project}#{sequence:010}"


def _image_record(project: int, sha256: str) -> str:
    return f"image#{project}#{sha256}"


def _audit_record(audit: Audit) -> str:
    return f"audit#{audit.version}#{audit.task}"


def _without(hashes: Set[str], drift: Drift | None) -> Drift:
    """Without the images; its figures stay until the next image comes."""
    before = drift or Drift(served=[])
    return msgspec.structs.replace(before, served=[one for one in before.served if one.sha256 not in hashes])


def _promotion_item(promotion: Promotion) -> dict[str, Any]:
    record = _key(promotion.model, f"promotion#{promotion.job_name}")
    return {**record, **_body(promotion), "verdict": {"S": promotion.verdict}}


def _pair_record(pair: ShadowPair) -> str:
    return f"shadow#{pair.version}#{pair.task}"


def _body(record: Record) -> dict[str, Any]:
    return {"body": {"S": msgspec.json.encode(record).decode()}}
