"""boto3's clients of AWS, with timeouts and retries that leave a function time to say what failed.

Retries wait longer and longer, at random (botocore's mode `standard`). What is repeated may have been done already, so every
caller's request is one that can be done twice.
"""

from __future__ import annotations

from typing import Any

import boto3
from botocore.config import Config


def client(
    service: str, *, connect_timeout: float = 3.0, read_timeout: float = 10.0, attempts: int = 4, at_once: int = 10
) -> Any:
    """A client of one service of the environment's account and region. Timeouts in seconds; `at_once`: requests side by side."""
    config = Config(
        connect_timeout=connect_timeout,
        read_timeout=read_timeout,
        retries={"mode": "standard", "total_max_attempts": attempts},
        max_pool_connections=at_once,
    )
    untyped: Any = boto3
    return untyped.client(service, config=config)
