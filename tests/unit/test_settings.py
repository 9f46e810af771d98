"""The environment is read through one door, and what is missing is named."""

from __future__ import annotations

import pytest

from labelloop.errors import SettingsError
from labelloop.settings import Settings

REQUIRED = [
    "stage",
    "images_bucket",
    "artifacts_bucket",
    "ledger_table",
    "label_studio_url",
    "label_studio_secret",
    "backend_secret_prefix",
    "mlflow_tracking_uri",
    "event_bus",
    "promote_queue",
    "training_role",
    "training_image",
    "training_code",
]


@pytest.mark.parametrize("name", REQUIRED)
def test_each_setting_comes_from_its_variable(name: str) -> None:
    variable = f"LABELLOOP_{name.upper()}"
    assert getattr(Settings({variable: "value"}), name) == "value"
    for environment in ({}, {variable: ""}):
        with pytest.raises(SettingsError, match=variable):
            getattr(Settings(environment), name)


def test_what_may_be_absent_has_a_default() -> None:
    nothing = Settings({})
    assert (nothing.model_configs, nothing.opt_ml, nothing.endpoint_url) == (None, "/opt/ml", None)


def test_an_address_loses_its_trailing_slash() -> None:
    assert Settings({"LABELLOOP_LABEL_STUDIO_URL": "http://host:8080/"}).label_studio_url == "http://host:8080"


def test_a_token_is_of_use_only_where_lambda_gives_no_access_key() -> None:
    token = {"AWS_CONTAINER_AUTHORIZATION_TOKEN": "token"}
    assert Settings(token).credentials_token == "token"
    assert Settings({**token, "AWS_ACCESS_KEY_ID": "key"}).credentials_token is None
    assert Settings({}).credentials_token is None
