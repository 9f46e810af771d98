from __future__ import annotations

import pytest

from tests.infra.templates import LOCAL_CONTEXT, Templates, context_of, synthesize


@pytest.fixture(scope="session")
def prod(tmp_path_factory: pytest.TempPathFactory) -> Templates:
    folder = tmp_path_factory.mktemp("prod")
    return synthesize(context_of(folder), folder / "out")


@pytest.fixture(scope="session")
def local(tmp_path_factory: pytest.TempPathFactory) -> Templates:
    return synthesize(LOCAL_CONTEXT, tmp_path_factory.mktemp("local"))


@pytest.fixture(params=["prod", "local"])
def either(request: pytest.FixtureRequest) -> Templates:
    """What has to be true of every stage."""
    templates: Templates = request.getfixturevalue(request.param)
    return templates
