"""The app's templates, as the real app code writes them, and what the tests ask of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aws_cdk as cdk

import infra_cdk.app
from infra_cdk.sources import ROOT

Resource = dict[str, Any]
LOCAL_CONTEXT = {
    "stage": "local",
    "label_studio_url": "http://127.0.0.1:8080",
    "mlflow_url": "http://127.0.0.1:5000",
    "sagemaker_endpoint": "http://127.0.0.1:7000",
}
PROD = {"label_studio_url": "https://label.example.org/", "alarms_email": "operators@example.org"}


def context_of(folder: Path, **facts: Any) -> dict[str, str]:
    """The context of a stage `prod` with these facts; its stages.yaml is written into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "stages.yaml"
    file.write_text(json.dumps({"prod": {**PROD, **facts}}))  # JSON is YAML too
    return {"stage": "prod", "stages": str(file)}


@dataclass(frozen=True)
class Template:
    """One stack's template, and the folder its assets lie in."""

    body: dict[str, Any]
    folder: Path

    @property
    def resources(self) -> dict[str, Resource]:
        return dict(self.body["Resources"])

    def of_type(self, kind: str) -> dict[str, Resource]:
        return {name: resource for name, resource in self.resources.items() if resource["Type"] == f"AWS::{kind}"}

    def only(self, kind: str, **properties: Any) -> Resource:
        """The one resource of a type whose properties have these values."""
        found = [r for r in self.of_type(kind).values() if all(r["Properties"].get(k) == v for k, v in properties.items())]
        assert len(found) == 1, f"{len(found)} resources {kind} with {properties}"
        return found[0]

    def id_of(self, resource: Resource) -> str:
        return next(name for name, candidate in self.resources.items() if candidate == resource)

    @property
    def outputs(self) -> dict[str, Any]:
        """Without those that other stacks import."""
        return {key: output["Value"] for key, output in self.body["Outputs"].items() if "Export" not in output}

    @property
    def functions(self) -> dict[str, Resource]:
        """labelloop's functions by their names."""
        functions = self.of_type("Lambda::Function").values()
        return {f["Properties"]["Environment"]["Variables"]["POWERTOOLS_SERVICE_NAME"]: f for f in functions}

    def statements(self, role: str) -> Iterator[dict[str, Any]]:
        """All that the role with this logical id is allowed."""
        for policy in self.of_type("IAM::Policy").values():
            if {"Ref": role} in policy["Properties"]["Roles"]:
                yield from policy["Properties"]["PolicyDocument"]["Statement"]


@dataclass(frozen=True)
class Templates:
    state: Template
    training: Template
    serving: Template

    def __iter__(self) -> Iterator[Template]:
        return iter((self.state, self.training, self.serving))

    @property
    def functions(self) -> dict[str, Resource]:
        return {**self.training.functions, **self.serving.functions}


def new_app(context: Mapping[str, str], folder: Path) -> cdk.App:
    """An app as the CLI starts it, writing to `folder`, except that dependency layers are not built."""
    flags = json.loads((ROOT / "cdk.json").read_text())["context"]
    return cdk.App(
        context={**flags, **context, "aws:cdk:bundling-stacks": []},
        outdir=str(folder),
        analytics_reporting=False,
    )


def synthesize(context: Mapping[str, str], folder: Path) -> Templates:
    app = new_app(context, folder)
    infra_cdk.app.build(app)
    assembly = app.synth()
    stacks = {stack.stack_name: stack.template for stack in assembly.stacks}
    assert list(stacks) == [f"labelloop-{context['stage']}-{name}" for name in ("state", "training", "serving")]
    return Templates(*(Template(body, folder) for body in stacks.values()))


def flat(value: Any) -> str:
    """An intrinsic function as one line of text, to look for words in."""
    match value:
        case {"Fn::Join": [separator, parts]}:
            return str(separator).join(flat(part) for part in parts)
        case {"Fn::GetAtt": [resource, attribute]}:
            return f"<{resource}.{attribute}>"
        case {"Ref": name} | {"Fn::ImportValue": name}:
            return f"<{name}>"
        case _:
            return value if isinstance(value, str) else json.dumps(value)
