"""Who may call the front door."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labelloop.authorize import authorize
from labelloop.errors import RequestError
from tests.examples import basic

STAGE = "arn:aws:execute-api:us-east-1:000000000000:abc123/v1"
ARN = f"{STAGE}/POST/digits/predict"
PASSWORDS = {"digits": ("s3cret:with colon",), "faces": ("other",), "pets": ("new", "old"), "empty": ("",)}


def answer(header: str, arn: str = ARN) -> dict[str, Any]:
    return authorize(header, arn, lambda model: PASSWORDS.get(model, ()))


def statement(policy: dict[str, Any]) -> tuple[str, str]:
    [only] = policy["policyDocument"]["Statement"]
    assert only["Action"] == "execute-api:Invoke"
    return only["Effect"], only["Resource"]


@pytest.mark.parametrize(
    "arn", [ARN, f"{STAGE}/GET/digits/versions", f"{STAGE}/GET/faces/health", f"{STAGE}/POST/digits/webhook"]
)
def test_right_credentials_open_the_whole_path_of_their_model_and_no_other(arn: str) -> None:
    policy = answer(basic("digits", "s3cret:with colon"), arn)
    assert policy["principalId"] == "digits"
    assert statement(policy) == ("Allow", f"{STAGE}/*/digits/*")


@pytest.mark.parametrize("password", ["new", "old"])
def test_during_a_rotation_both_passwords_open(password: str) -> None:
    assert statement(answer(basic("pets", password))) == ("Allow", f"{STAGE}/*/pets/*")


@pytest.mark.parametrize("scheme", ["basic", "BASIC", "Basic"])
def test_the_scheme_is_read_in_any_case(scheme: str) -> None:
    assert statement(answer(scheme + basic("faces", "other")[5:]))[0] == "Allow"


@pytest.mark.parametrize(
    ("user", "password"),
    [
        ("digits", "wrong"),
        ("digits", ""),
        ("digits", "other"),
        ("faces", "s3cret:with colon"),
        ("nobody", "other"),
        ("nobody", ""),
        ("empty", ""),
        ("", ""),
        ("*", "other"),
        ("faces/../digits", "other"),
        ("digits", "ſ3cret:with colon"),
        ("Faces", "other"),
        ("pets", "older"),
    ],
)
def test_wrong_credentials_are_denied_everywhere(user: str, password: str) -> None:
    assert statement(answer(basic(user, password))) == ("Deny", f"{STAGE}/*")


@pytest.mark.parametrize(
    "header",
    [
        "",
        "Basic",
        "Basic ",
        "Bearer abc",
        "Basic !!!",
        "Basic " + base64.b64encode(b"no colon").decode(),
        "Basic " + base64.b64encode(b"\xff\xfe:x").decode(),
        "Basic Zm9vOmJhcg",  # without its padding
        "Basic é",
        "Token " + basic("digits", "s3cret:with colon")[6:],
    ],
)
def test_what_holds_no_credentials_is_no_request_to_decide_about(header: str) -> None:
    with pytest.raises(RequestError, match="no Basic credentials"):
        answer(header)


def test_only_a_possible_model_name_is_looked_up() -> None:
    asked: list[str] = []

    def look_up(name: str) -> tuple[str, ...]:
        asked.append(name)
        return ()

    for user in ("../secret", "digits/x", "", "A", "digits"):
        authorize(basic(user, "x"), ARN, look_up)
    assert asked == ["digits"]


@given(st.text())
def test_no_header_breaks_it(header: str) -> None:
    for text in (header, f"Basic {header}"):
        try:
            policy = answer(text)
        except RequestError:
            continue
        assert statement(policy)[0] == "Deny"
