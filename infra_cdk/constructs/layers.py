"""The layers of a stack's functions. Every stack has its own: a layer shared between stacks could never be replaced."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import aws_cdk as cdk
import msgspec
from aws_cdk import aws_lambda as lambda_
from constructs import Construct

from infra_cdk.dependency_build import LAMBDA_PLATFORM, DependencyBuild, compile_sources, host_platform
from infra_cdk.sources import LAYERS, LIBRARY, assembled
from infra_cdk.stage import Stage
from labelloop.model_config import ModelConfigs


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
        with library_folder(compiled=cdk.Stack.of(self).bundling_required) as folder:
            return self._layer("Library", compiled_code(folder))

    @cached_property
    def model_configs(self) -> lambda_.LayerVersion:
        with model_configs_folder(self._stage.models) as folder:
            return self._layer("ModelConfigs", lambda_.Code.from_asset(folder))

    def _dependencies(self, id: str, requirements: Path) -> lambda_.LayerVersion:
        if not cdk.Stack.of(self).bundling_required:  # the CLI only wants to know the stacks' names
            return self._layer(id, lambda_.Code.from_asset(str(requirements.parent)))
        build = DependencyBuild(requirements=requirements, platform=host_platform() if self._stage.is_local else LAMBDA_PLATFORM)
        return self._layer(id, lambda_.Code.from_asset(str(build.folder()), asset_hash=build.key))

    def _layer(self, id: str, code: lambda_.Code) -> lambda_.LayerVersion:
        return lambda_.LayerVersion(self, id, code=code, compatible_runtimes=[lambda_.Runtime.PYTHON_3_13])


@contextmanager
def library_folder(*, compiled: bool) -> Iterator[str]:
    """The layer `library`: labelloop's sources, which tracebacks show, and unless only synthesized their byte code."""
    with assembled({"python/labelloop": LIBRARY}) as folder:
        if compiled:
            compile_sources(Path(folder) / "python", legacy=False)
        yield folder


def compiled_code(folder: str) -> lambda_.Code:
    """The folder as an asset, which is another one when its sources are: byte code differs from one run to the next."""
    return lambda_.Code.from_asset(folder, asset_hash=cdk.FileSystem.fingerprint(folder, exclude=["__pycache__"]))


@contextmanager
def model_configs_folder(models: ModelConfigs) -> Iterator[str]:
    """The layer `model_configs`: config (as JSON, which is YAML too) and template of every model."""
    parts: dict[str, Path | bytes] = {}
    for name in models.names:
        parts[f"python/model_configs/{name}/config.yaml"] = msgspec.json.encode(models[name].config)
        parts[f"python/model_configs/{name}/labeling_template.xml"] = models[name].folder / "labeling_template.xml"
    with assembled(parts) as folder:
        yield folder
