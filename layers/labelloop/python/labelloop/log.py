"""A function's log: one JSON object a line on standard output, which Lambda puts into its log group.

Powertools' Logger writes nearly the same; what importing it costs predict's start stands in docs/architecture.md ("Logs").
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from functools import wraps
from typing import Any

from labelloop.settings import Settings


class Log:
    """Each method writes a line: what happened, in the same words each time, and the fields that tell one time from another.

    `model` and the like can be given for all lines of an invocation.
    """

    def __init__(self) -> None:
        self._fields: dict[str, Any] = {}

    def of_invocations[**P, R](self, handler: Callable[P, R]) -> Callable[P, R]:
        """Wrap a handler: the lines say in which invocation they were written."""

        @wraps(handler)
        def invoked(*given: P.args, **named: P.kwargs) -> R:
            context: Any = given[1]
            self._fields = {"function_request_id": context.aws_request_id}
            return handler(*given, **named)

        return invoked

    def keep(self, **fields: Any) -> None:
        """Put these fields into all further lines of the invocation."""
        self._fields |= fields

    def info(self, message: str, **fields: Any) -> None:
        self._write("INFO", message, fields)

    def warning(self, message: str, **fields: Any) -> None:
        self._write("WARNING", message, fields)

    def error(self, message: str, **fields: Any) -> None:
        self._write("ERROR", message, fields)

    def exception(self, message: str, **fields: Any) -> None:
        """An error, with the traceback of the exception that is being handled."""
        self._write("ERROR", message, {**fields, "exception": traceback.format_exc()})

    def _write(self, level: str, message: str, fields: dict[str, Any]) -> None:
        at = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = {"level": level, "message": message, "timestamp": at, "service": Settings().function, **self._fields, **fields}
        sys.stdout.write(json.dumps(line, default=str) + "\n")
        sys.stdout.flush()
