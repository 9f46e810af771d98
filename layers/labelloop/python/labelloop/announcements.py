"""Events on labelloop's bus, which tell the other functions what has happened."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from botocore.exceptions import BotoCoreError, ClientError

from labelloop.errors import ServiceError
from labelloop.records import Promotion, VersionJudged


def announce(events: Any, bus: str, what: Literal["ModelPromoted", "ModelKept"], detail: Promotion | VersionJudged) -> None:
    """Put an event on the bus, with boto3's client of EventBridge. Raises `ServiceError`."""
    entry = {
        "EventBusName": bus,
        "Source": "labelloop",
        "DetailType": what,
        "Detail": msgspec.json.encode(detail).decode(),
    }
    try:
        answer = events.put_events(Entries=[entry])
    except (ClientError, BotoCoreError) as error:
        raise ServiceError(f"EventBridge does not take the event: {error}") from error
    if answer["FailedEntryCount"]:
        raise ServiceError(f"EventBridge refused the event: {answer['Entries'][0].get('ErrorMessage')}")
