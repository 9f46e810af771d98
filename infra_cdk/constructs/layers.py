"""The layers of a stack's functions. Every stack has its own: a layer shared between stacks could never be replaced."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import aws_cdk as cdk
from aws_cdk import aws_lambda as lambda_
from constructs import Construct

from infra_cdk.dependency_build import LAMBDA_PLATFORM, DependencyBuild, host_platform
from infra_cdk.sources import LAYERS, LIBRARY, assembled
from infra_cdk.stage import Stage


class Layers(Construct):
    """`core`, `inference`: packages; `library`: labelloop; `model_configs`: what functions read of them. Made when used."""

    def __init__(self, scope: Construct, id: str, *, stage: Stage) -> None:
        super().__init__(scope, id)
        self._stage = stage

    @cached_property
    def core(self) -> lambda_.LayerVersion:
        return self._dependencies("Core", LAYERS / "core" / "requirements.txt")

    @cached_property
    def inference(self) -> lambda_.LayerVersion:
        return self._dependencies("Inference", LAYERS / "inference" / "requirements.txt")

    @cached_property
    def library(self) -> lambda_.LayerVersion:
        return self._files("Library", {"python/labelloop": LIBRARY})

    @cached_property
    def model_configs(self) -> lambda_.LayerVersion:
        names = ("config.yaml", "labeling_template.xml")
        root = Path(str(self._stage.models.root))
        return self._files(
            "ModelConfigs",
            {f"python/model_configs/{model}/{name}": root / model / name for model in self._stage.models.names for name in names},
        )

    def _dependencies(self, id: str, requirements: Path) -> lambda_.LayerVersion:
        if not cdk.Stack.of(self).bundling_required:  # the CLI only wants to know the stacks' names
            return self._layer(id, lambda_.Code.from_asset(str(requirements.parent)))
        build = DependencyBuild(requirements=requirements, platform=host_platform() if self._stage.is_local else LAMBDA_PLATFORM)
        return self._layer(id, lambda_.Code.from_asset(str(build.folder()), asset_hash=build.key))

    def _files(self, id: str, parts: dict[str, Path]) -> lambda_.LayerVersion:
        with assembled(parts) as folder:
            return self._layer(id, lambda_.Code.from_asset(folder))

    def _layer(self, id: str, code: lambda_.Code) -> lambda_.LayerVersion:
        return lambda_.LayerVersion(self, id, code=code, compatible_runtimes=[lambda_.Runtime.PYTHON_3_13])
