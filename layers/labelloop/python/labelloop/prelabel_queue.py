"""The queue of ranges of tasks to predict: who fills it needs no model, and none of what runs one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from itertools import batched
from typing import Any

import msgspec
from botocore.exceptions import BotoCoreError, ClientError

from labelloop.errors import ServiceError
from labelloop.label_studio.client import LabelStudioClient
from labelloop.records import TaskRange

RANGE = 100  # tasks


class PrelabelQueue:
    """The queue at a URL; `client` is boto3's of SQS."""

    def __init__(self, url: str, client: Any) -> None:
        self._url, self._client = url, client

    def send(self, ranges: Iterable[TaskRange], *, delay: timedelta = timedelta()) -> int:
        """Send ranges, at most a quarter of an hour late; how many. Raises `ServiceError`."""
        sent = 0
        for tasks in ranges:
            body = msgspec.json.encode(tasks).decode()
            try:
                self._client.send_message(QueueUrl=self._url, MessageBody=body, DelaySeconds=int(delay.total_seconds()))
            except (BotoCoreError, ClientError) as error:
                raise ServiceError(f"the prelabel queue takes no message: {error}") from error
            sent += 1
        return sent


def asked_ranges(model: str, tasks: Sequence[int]) -> Iterator[TaskRange]:
    """Tasks that somebody asked predictions of, by id, `RANGE` in each."""
    for some in batched(sorted(set(tasks)), RANGE, strict=False):
        yield TaskRange(model=model, after=some[0] - 1, upto=some[-1], asked=list(some))


def unlabelled_ranges(model: str, label_studio: LabelStudioClient, project: int) -> Iterator[TaskRange]:
    """All unlabelled tasks of a project, by id, in ranges of `RANGE`; a page of ids at a time is kept."""
    last = 0
    while ids := label_studio.unlabelled_ids(project, last):
        for some in batched(ids, RANGE, strict=False):
            yield TaskRange(model=model, after=last, upto=some[-1])
            last = some[-1]
