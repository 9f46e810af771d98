"""A browser signed in to a laptop's Label Studio."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Page, sync_playwright

from local.stack import Addresses
from tests.browser import chromium

# What the editor would submit now.
REGIONS = "() => window.Htx?.annotationStore?.selected?.serializeAnnotation?.() ?? []"


@contextmanager
def signed_in(addresses: Addresses) -> Iterator[Page]:
    """A page of Label Studio."""
    executable = chromium.find()
    assert executable, "there is no Chromium; run: make browser"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=executable, args=["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        )
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        page.goto(f"{addresses.label_studio}/user/login/")
        page.fill("#email", addresses.label_studio_user)
        page.fill("#password", addresses.label_studio_password)
        page.click('button[aria-label="Log In"]')
        page.wait_for_url(re.compile(r"/(projects|$)"))
        yield page
        browser.close()
