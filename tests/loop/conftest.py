"""The order of the loop's tests."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Faults come last: they train versions and use annotations up that the others count on."""
    items.sort(key=lambda item: item.path.name == "test_faults.py")
