"""The watchdog: a webhook that Label Studio switched off is on again, and nobody else's is touched."""

from __future__ import annotations

from typing import Any, cast

import pytest

from labelloop.errors import LabelStudioError, NotSetUpError
from labelloop.label_studio.client import Webhook
from labelloop.ledger import Ledger
from labelloop.retrain import Watchdog
from tests.fake_label_studio import FakeLabelStudio

OURS = Webhook(1, "https://api.example.com/v1/digits/webhook", is_active=False, actions=["ANNOTATION_CREATED"])
OTHERS = Webhook(2, "https://elsewhere.example.com/hook?from=/digits/webhook", is_active=False, actions=[])


def look(ledger: Ledger, *hooks: Webhook, down: str = "") -> tuple[str | None, dict[int, bool]]:
    label_studio = FakeLabelStudio(webhooks_={hook.id: hook for hook in hooks}, down={down})
    finding = Watchdog(ledger, cast(Any, label_studio))("digits")
    return finding, {hook.id: hook.is_active for hook in label_studio.webhooks(1)}


def test_what_was_switched_off_is_switched_on_and_said(ledger: Ledger) -> None:
    ledger.set_project("digits", 1)
    finding, active = look(ledger, OURS, OTHERS)
    assert active == {1: True, 2: False}
    assert finding is not None
    assert OURS.url in finding


def test_what_is_on_is_left_alone(ledger: Ledger) -> None:
    ledger.set_project("digits", 1)
    on = Webhook(1, OURS.url, is_active=True, actions=[])
    assert look(ledger, on, down="switch_on") == (None, {1: True})


def test_a_missing_one_is_said_with_its_remedy(ledger: Ledger) -> None:
    ledger.set_project("digits", 1)
    finding, active = look(ledger, OTHERS)
    assert active == {2: False}
    assert finding is not None
    assert "labelloop setup-label-studio-project digits" in finding


def test_errors_are_of_the_tree(ledger: Ledger) -> None:
    with pytest.raises(NotSetUpError):
        look(ledger, OURS)
    ledger.set_project("digits", 1)
    with pytest.raises(LabelStudioError):
        look(ledger, OURS, down="webhooks")
