"""The playground in a real browser, where there is one."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator

import pytest
from playwright.async_api import Page, async_playwright, expect

from tests.service.gateway.harness import ScriptedWorker

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")


@pytest.fixture
async def page(url: str, worker: ScriptedWorker) -> AsyncIterator[Page]:
    """The page once it knows the models; whatever it logs as an error fails the test."""
    errors: list[str] = []
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        opened = await browser.new_page()
        opened.on("pageerror", lambda error: errors.append(str(error)))
        await opened.goto(url)
        await expect(opened.locator("#model")).to_have_value("tiny-text")
        yield opened
        await browser.close()
    assert errors == []


async def test_a_prompt_becomes_a_picture(page: Page) -> None:
    await page.fill("#prompt", "a red apple")
    await page.press("#prompt", "Enter")
    await expect(page.locator("#status")).to_have_text("Done")
    await expect(page.locator("#saved")).to_have_text("33 %")
    assert await page.locator("figure canvas").count() == 2
    await expect(page.locator("#generate")).to_be_enabled()


async def test_a_running_job_can_be_cancelled(page: Page, worker: ScriptedWorker) -> None:
    worker.curtain.clear()
    await page.select_option("#model", "tiny-class")
    await page.fill("#class", "cat")
    await page.fill("#n", "3")
    await page.click("#generate")
    await expect(page.locator("figure")).to_have_count(3)
    await expect(page.locator("#status")).to_have_text("Drawing…")
    await page.click("#cancel")
    await expect(page.locator("#status")).to_have_text("Cancelled")


async def test_what_the_server_refuses_is_said(page: Page) -> None:
    await page.select_option("#model", "tiny-class")
    await page.fill("#class", "unicorn")
    await page.click("#generate")
    await expect(page.get_by_role("alert")).to_contain_text("no such class")
