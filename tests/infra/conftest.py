from __future__ import annotations

import pytest

import infra_cdk.app
from tests.infra.templates import LOCAL_CONTEXT, Template, Templates, context_of, new_app, synthesize


@pytest.fixture(scope="session")
def prod(tmp_path_factory: pytest.TempPathFactory) -> Templates:
    folder = tmp_path_factory.mktemp("prod")
    return synthesize(context_of(folder), folder / "out")


@pytest.fixture(scope="session")
def with_label_studio(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Template]:
    """All stacks of a stage that deploys Label Studio, by their names without the stage's."""
    folder = tmp_path_factory.mktemp("label-studio")
    server = {"domain": "labels.example.org", "admin_email": "admin@example.org"}
    zone = {"id": "Z0ABC", "name": "example.org"}
    app = new_app(context_of(folder, label_studio_url=None, label_studio={**server, "hosted_zone": zone}), folder / "out")
    infra_cdk.app.build(app)
    stacks = app.synth().stacks
    return {stack.stack_name.removeprefix("labelloop-prod-"): Template(stack.template, folder / "out") for stack in stacks}


@pytest.fixture(scope="session")
def local(tmp_path_factory: pytest.TempPathFactory) -> Templates:
    return synthesize(LOCAL_CONTEXT, tmp_path_factory.mktemp("local"))


@pytest.fixture(params=["prod", "local"])
def either(request: pytest.FixtureRequest) -> Templates:
    """What has to be true of every stage."""
    templates: Templates = request.getfixturevalue(request.param)
    return templates
