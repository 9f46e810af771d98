"""The order of the loop's tests."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Workflows, faults and grants come last: they train versions and use annotations up that the others count on."""
    last = ("test_workflows.py", "test_faults.py", "test_grants.py")
    items.sort(key=lambda item: last.index(item.path.name) if item.path.name in last else -1)
