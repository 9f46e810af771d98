"""Outputs by exact key: the CLI finds a deployment by them (docs/architecture.md lists all)."""

from __future__ import annotations

import aws_cdk as cdk


def output(stack: cdk.Stack, key: str, value: str) -> None:
    cdk.CfnOutput(stack, f"{key}Output", value=value).override_logical_id(key)
