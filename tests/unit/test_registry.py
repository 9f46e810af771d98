"""MLflow's registry over REST, against a server that writes down what it is asked."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from labelloop.errors import RegistryError
from labelloop.registry import Registry
from tests.recording_server import Answer, RecordingServer, serving


@pytest.fixture
def mlflow() -> Iterator[RecordingServer]:
    with serving() as server:
        yield server


def test_an_alias_and_tags_are_set(mlflow: RecordingServer) -> None:
    registry = Registry(mlflow.url + "/")
    registry.set_alias("digits", "champion", 3)
    registry.tag("digits", 3, {"verdict": "promote", "verdict_reason": "not worse"})
    assert mlflow.paths == [
        "POST /api/2.0/mlflow/registered-models/alias",
        "POST /api/2.0/mlflow/model-versions/set-tag",
        "POST /api/2.0/mlflow/model-versions/set-tag",
    ]
    assert [request.json for request in mlflow.requests] == [
        {"name": "digits", "alias": "champion", "version": "3"},
        {"name": "digits", "version": "3", "key": "verdict", "value": "promote"},
        {"name": "digits", "version": "3", "key": "verdict_reason", "value": "not worse"},
    ]
    assert "authorization" not in mlflow.requests[0].headers


def test_a_refusal_is_an_error_with_what_mlflow_said(mlflow: RecordingServer) -> None:
    mlflow.answer = lambda _: Answer(404, {"error_code": "RESOURCE_DOES_NOT_EXIST"})
    with pytest.raises(RegistryError, match="RESOURCE_DOES_NOT_EXIST") as caught:
        Registry(mlflow.url).set_alias("digits", "champion", 3)
    assert caught.value.status == 404


def test_what_is_not_there_is_nothing_and_a_server_that_fails_is_an_error(mlflow: RecordingServer) -> None:
    """An erasure that took the one for the other would leave the image there, and say that it is gone."""
    registry = Registry(mlflow.url)
    mlflow.answer = lambda _: Answer(404, {"error_code": "RESOURCE_DOES_NOT_EXIST"})
    assert (registry.runs_of("digits", "d" * 64), registry.artifact("1/run/artifacts/evaluation.html")) == ([], None)
    mlflow.answer = lambda _: Answer(500)
    with pytest.raises(RegistryError, match="500"):
        registry.runs_of("digits", "d" * 64)
    with pytest.raises(RegistryError, match="500"):
        registry.artifact("1/run/artifacts/evaluation.html")


def test_a_server_that_is_overloaded_for_a_moment_is_asked_again(mlflow: RecordingServer) -> None:
    mlflow.answer = lambda _: Answer(503 if len(mlflow.requests) == 1 else 200)
    Registry(mlflow.url).set_alias("digits", "champion", 3)
    assert len(mlflow.requests) == 2


def test_a_dead_server_is_an_error() -> None:
    with serving() as server:
        url = server.url
    with pytest.raises(RegistryError, match="does not answer"):
        Registry(url).tag("digits", 1, {"a": "b"})


def test_an_app_is_reached_where_aws_has_it() -> None:
    assert (
        Registry("arn:aws:sagemaker:eu-west-1:000000000000:mlflow-app/app-1")._url == "https://mlflow.sagemaker.eu-west-1.app.aws"
    )
