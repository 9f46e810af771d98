"""Every error of the tree has an HTTP status and an exit code, and says what it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from labelloop import errors
from labelloop.errors import LabelloopError


def tree(root: type[LabelloopError] = LabelloopError) -> list[type[LabelloopError]]:
    return [root, *(found for child in root.__subclasses__() for found in tree(child))]


def an(kind: type[LabelloopError]) -> LabelloopError:
    match kind:
        case errors.ConfigError:
            return errors.ConfigError("config.yaml", "message", "a.key")
        case errors.LocalServiceError:
            return errors.LocalServiceError("mlflow", "message", Path("mlflow.log"))
        case errors.TooLargeError:
            return errors.TooLargeError("message", 5)
        case _:
            return kind("message")


STATUS = {
    "LabelloopError": 500,
    "SettingsError": 500,
    "ConfigError": 500,
    "RequestError": 400,
    "UnknownModelError": 404,
    "ImageError": 400,
    "AnnotationError": 400,
    "TooLargeError": 500,
    "ModelError": 500,
    "ConflictError": 409,
    "LateError": 503,
    "NotSetUpError": 409,
    "ServiceError": 503,
    "LabelStudioError": 503,
    "RegistryError": 503,
    "NotRegisteredError": 503,
    "StorageError": 503,
    "TrainingServiceError": 503,
    "LocalServiceError": 503,
}


def test_the_table_covers_the_tree() -> None:
    assert {kind.__name__ for kind in tree() if kind.__module__ == "labelloop.errors"} == STATUS.keys()


def test_the_docstring_draws_the_whole_tree() -> None:
    assert errors.__doc__ is not None
    assert not [name for name in STATUS if name not in errors.__doc__]


@pytest.mark.parametrize("kind", tree(), ids=lambda kind: kind.__name__)
def test_every_error_becomes_a_number_in_one_place(kind: type[LabelloopError]) -> None:
    error = an(kind)
    assert "message" in str(error)
    assert errors.http_status(error) == STATUS[kind.__name__]
    assert errors.exit_code(error) == (3 if isinstance(error, errors.ServiceError) else 2)


def test_errors_name_their_places() -> None:
    assert str(an(errors.ConfigError)) == "config.yaml: a.key: message"
    assert str(errors.ConfigError(Path("config.yaml"), "message")) == "config.yaml: message"
    assert str(an(errors.LocalServiceError)) == "mlflow: message\n  log: mlflow.log"
    assert errors.LabelStudioError("message", status=502).status == 502
