"""The functions' log: one JSON object a line."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest

from labelloop.log import Log


@pytest.fixture
def lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("POWERTOOLS_SERVICE_NAME", "predict")
    return lambda: [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_line_says_what_when_where_and_how_grave(lines: Any) -> None:
    log = Log()
    log.info("predicted", tasks=3, at=datetime(2026, 1, 2, tzinfo=UTC))
    log.warning("refused")
    log.error("comes again", reason="half a \ud83d character")
    info, warning, error = lines()
    assert datetime.now(UTC) > datetime.fromisoformat(info.pop("timestamp")) > datetime(2026, 1, 1, tzinfo=UTC)
    assert info == {
        "level": "INFO",
        "message": "predicted",
        "service": "predict",
        "tasks": 3,
        "at": "2026-01-02 00:00:00+00:00",
    }
    assert (warning["level"], error["level"], error["reason"]) == ("WARNING", "ERROR", "half a \ud83d character")


def test_what_is_kept_ends_with_the_invocation(lines: Any) -> None:
    log = Log()

    @log.of_invocations
    def handler(event: dict[str, str], context: Any) -> str:
        if event:
            log.keep(model=event["model"])
        log.info("handled")
        return "done"

    assert handler({"model": "digits"}, SimpleNamespace(aws_request_id="1")) == "done"
    assert handler({}, SimpleNamespace(aws_request_id="2")) == "done"
    first, second = lines()
    assert (first["function_request_id"], first["model"]) == ("1", "digits")
    assert second["function_request_id"] == "2"
    assert "model" not in second


def test_an_exception_brings_its_traceback(lines: Any) -> None:
    log = Log()
    try:
        raise ValueError("of this kind")
    except ValueError:
        log.exception("failed", model="digits")
    (line,) = lines()
    assert (line["level"], line["model"]) == ("ERROR", "digits")
    assert line["exception"].startswith("Traceback")
    assert line["exception"].rstrip().endswith("ValueError: of this kind")
