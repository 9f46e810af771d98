"""A Lambda function of labelloop: its folder under functions/, its own role, its own log group."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import aws_cdk as cdk
from aws_cdk import aws_iam as iam
from aws_cdk import aws_lambda as lambda_
from aws_cdk import aws_logs as logs
from constructs import Construct

from infra_cdk.constructs.layers import compiled_code
from infra_cdk.dependency_build import compile_sources
from infra_cdk.nag import acknowledge, acknowledge_finding
from infra_cdk.sources import FUNCTIONS, assembled
from infra_cdk.stage import Stage

INFERENCE_THREADS = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # functions spread images over the cores themselves


class PythonFunction(lambda_.Function):
    """`functions/{name}/handler.py`, entry `handler`. `execution_role` may write the log and traces, and what it is granted.

    `concurrency`: how many run at once at most, set aside for it; a queue's worker is bounded by its event source instead.
    `snapshot`: published versions start from a snapshot of their memory, taken when one is made (SnapStart).
    """

    def __init__(
        self,
        scope: Construct,
        id: str,
        *,
        stage: Stage,
        name: str,
        description: str,
        environment: Mapping[str, str],
        layers: Sequence[lambda_.ILayerVersion],
        memory_mb: int,
        timeout: cdk.Duration,
        concurrency: int | None = None,
        snapshot: bool = False,
    ) -> None:
        log_group = logs.LogGroup(scope, f"{id}Log", retention=stage.log_retention, removal_policy=cdk.RemovalPolicy.DESTROY)
        role = iam.Role(scope, f"{id}Role", assumed_by=iam.ServicePrincipal("lambda.amazonaws.com"))
        log_group.grant_write(role)
        with function_folder(name, compiled=cdk.Stack.of(scope).bundling_required) as folder:
            super().__init__(
                scope,
                id,
                description=description,
                code=compiled_code(folder),
                handler="handler.handler",
                runtime=lambda_.Runtime.PYTHON_3_13,
                architecture=_architecture(stage),
                environment={
                    "LABELLOOP_STAGE": stage.name,
                    "POWERTOOLS_SERVICE_NAME": name,
                    **environment,
                },
                layers=list(layers),
                memory_size=memory_mb,
                timeout=timeout,
                role=role,
                log_group=log_group,
                tracing=lambda_.Tracing.ACTIVE,
                reserved_concurrent_executions=concurrency,
                snap_start=lambda_.SnapStartConf.ON_PUBLISHED_VERSIONS if snapshot else None,
            )
        self.execution_role, self.memory_mb = role, memory_mb
        acknowledge(self, L1="Python 3.13 is what every layer and test is built for; the next version comes with its own change")
        acknowledge_finding(role, "AwsSolutions-IAM5[Resource::*]", reason="X-Ray's write actions know no resources")


@contextmanager
def function_folder(name: str, *, compiled: bool) -> Iterator[str]:
    """A function's own code: its sources and, unless only synthesized, their byte code."""
    with assembled({".": FUNCTIONS / name}) as folder:
        if compiled:
            compile_sources(Path(folder), legacy=False, at="/var/task")
        yield folder


def _architecture(stage: Stage) -> lambda_.Architecture:
    """x86_64; on a laptop functions run on the machine as it is."""
    arm = stage.is_local and platform.machine() in ("arm64", "aarch64")
    return lambda_.Architecture.ARM_64 if arm else lambda_.Architecture.X86_64
