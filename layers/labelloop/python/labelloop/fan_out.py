"""Large predict requests over parallel invocations of `predict_part`, and the queue for what is late.

Only a request that needs it imports this: boto3 takes a third of a second to import, which every cold start would pay.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import batched
from typing import Any

import msgspec
from botocore.exceptions import BotoCoreError, ClientError

from labelloop import aws
from labelloop.errors import ServiceError
from labelloop.label_studio.payloads import PredictTask
from labelloop.messages import PrelabelQueue, asked_ranges
from labelloop.predict import LAST_IMAGE, MAX_TASKS, PART, Part
from labelloop.records import Champion
from labelloop.wording import counted

_SHORTEST, _LONGEST = 0.25, 2.0  # seconds between two tries of what Lambda had no room for
_THROTTLED = "TooManyRequestsException"


class PartAnswer(msgspec.Struct, frozen=True):
    """What `predict_part` answers: an entry for each task, null for what it had no time for."""

    results: list[msgspec.Raw]


_ANSWERS = msgspec.json.Decoder(PartAnswer)


class FanOut:
    """`function` predicts parts; `client` is boto3's of Lambda. `log(message, **fields)` is told of parts that failed."""

    def __init__(self, function: str, client: Any, queue: PrelabelQueue, *, log: Callable[..., None]) -> None:
        self._function, self._client, self._queue, self._log = function, client, queue, log

    @classmethod
    def connect(cls, function: str, queue_url: str, *, log: Callable[..., None]) -> FanOut:
        """With clients that leave time for an answer: what fails is queued, and what cannot be queued is said."""
        # A part that is sent twice would be predicted twice, so nothing is repeated but what Lambda did not begin.
        invoking = aws.client("lambda", read_timeout=30, attempts=1, at_once=MAX_TASKS // PART)
        return cls(function, invoking, PrelabelQueue(queue_url, aws.client("sqs", read_timeout=2, attempts=2)), log=log)

    def predict(self, champion: Champion, tasks: Sequence[PredictTask], *, until: float) -> list[msgspec.Raw | None]:
        """Each task's entry of the answer, in JSON; None where none came. It returns by `until` (`time.monotonic`)."""
        if time.monotonic() >= until - LAST_IMAGE:
            return [None] * len(tasks)
        size = math.ceil(len(tasks) / math.ceil(len(tasks) / PART))  # parts of one size are done at one time
        parts = list(batched(tasks, size, strict=False))
        pool = ThreadPoolExecutor(len(parts))
        last = until - LAST_IMAGE
        by_clock = time.time() + last - time.monotonic()
        requests = [msgspec.json.encode(Part(champion, list(part), by_clock)) for part in parts]
        answers = [pool.submit(self._ask, request, last) for request in requests]
        wait(answers, timeout=max(until - time.monotonic(), 0))
        pool.shutdown(wait=False)  # an answer that comes later is nobody's
        return [entry for part, answer in zip(parts, answers, strict=True) for entry in self._entries(part, answer)]

    def queue(self, model: str, tasks: Sequence[int]) -> None:
        """Have the tasks with these ids predicted afterwards, labelled or not. Raises `ServiceError`."""
        self._queue.send(asked_ranges(model, tasks))

    def _entries(self, part: Sequence[PredictTask], answer: Future[bytes]) -> list[msgspec.Raw | None]:
        if not answer.done():
            self._log("a part did not answer in time", tasks=len(part))
            return [None] * len(part)
        try:
            entries = _read(answer.result(), len(part))
        except ServiceError as error:
            self._log("a part failed", tasks=len(part), reason=str(error))
            return [None] * len(part)
        return entries

    def _ask(self, request: bytes, until: float) -> bytes:
        """What a part answers, asked for until then while Lambda has no room. Raises `ServiceError`."""
        pause = _SHORTEST
        while True:
            try:
                answer = self._client.invoke(FunctionName=self._function, Payload=request)
                body: bytes = answer["Payload"].read()
            except ClientError as error:
                pause = random.uniform(pause, min(2 * pause, _LONGEST))
                if error.response["Error"]["Code"] != _THROTTLED or time.monotonic() + pause >= until:
                    raise ServiceError(f"{self._function} was not invoked: {error}") from error
                time.sleep(pause)
            except BotoCoreError as error:
                raise ServiceError(f"{self._function} does not answer: {error}") from error
            else:
                if "FunctionError" in answer:
                    raise ServiceError(f"{self._function} failed: {body[:300].decode(errors='replace')}")
                return body


def _read(body: bytes, tasks: int) -> list[msgspec.Raw | None]:
    try:
        results = _ANSWERS.decode(body).results
    except ValueError as error:
        raise ServiceError(f"a part answered what is no part's answer: {error}") from error
    if len(results) != tasks:
        raise ServiceError(f"a part answered {counted(len(results), 'entry', 'entries')} for {counted(tasks, 'task')}")
    return [None if bytes(entry) == b"null" else entry for entry in results]
