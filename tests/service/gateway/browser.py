"""The playground in a real browser, and rules that hold in every test."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from playwright.async_api import Page, Request, Route, async_playwright, expect

from tests.patience import PATIENCE

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
PATIENCE_MS = 1000 * PATIENCE


@asynccontextmanager
async def playground(
    url: str,
    fragment: str = "",
    *,
    ready: bool = True,
    advanced: bool = False,
    forgive: str | None = None,
    **context: Any,
) -> AsyncIterator[Page]:
    """Opens the page and waits until it has loaded the models. With `advanced`, all settings are unfolded.

    The test fails if the page logs an error, except lines that contain `forgive`, or sends a request to another
    origin.
    """
    errors: list[str] = []
    strangers: list[str] = []

    def note(kind: str, text: str) -> None:
        if kind == "error" and not (forgive and forgive in text):
            errors.append(text)

    async def guard(route: Route, request: Request) -> None:
        if request.url.startswith((url, "blob:", "data:")):
            await route.continue_()
        else:
            strangers.append(request.url)
            await route.abort()

    expect.set_options(timeout=PATIENCE_MS)
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=BROWSER, args=ARGUMENTS, timeout=PATIENCE_MS)
        page = await (await browser.new_context(**context)).new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: note(message.type, message.text))
        await page.route("**/*", guard)
        await page.goto(f"{url}/{fragment}")
        if ready:
            await expect(page.locator("#form:not([inert])")).to_be_visible()
        if advanced:
            await page.locator("summary").click()
        yield page
        await browser.close()
    assert errors == [], errors
    assert strangers == [], strangers


async def grey(page: Page, pane: int = 0) -> int:
    """The red value of a pixel of a pane's first picture, which is uniformly grey in scripts; -1: no such pane yet."""
    script = """([pane]) => {
        const canvas = document.querySelectorAll(".pane")[pane]?.querySelector("canvas");
        if (!canvas) return -1;
        const middle = [canvas.width / 4, canvas.height / 4].map(Math.floor);
        return canvas.getContext("2d").getImageData(...middle, 1, 1).data[0];
    }"""
    red: int = await page.evaluate(script, [pane])
    return red


async def nameless(page: Page) -> list[str]:
    """The visible controls that have no name for a screen reader."""
    script = """all => all.filter((each) => each.checkVisibility() && !each.ariaLabel && !each.textContent.trim()
        && !(each.labels?.length)).map((each) => each.outerHTML)"""
    selector = "button, input, select, textarea, canvas, progress, a, pre"
    found: list[str] = await page.locator(selector).evaluate_all(script)
    return found


async def turns(page: Page, wanted: int) -> None:
    """Waits until the first picture has that grey: a frame is decoded before it is drawn."""
    async with asyncio.timeout(PATIENCE):
        while await grey(page) != wanted:
            await page.evaluate("new Promise(requestAnimationFrame)")


async def draw(page: Page, prompt: str = "a red apple", seed: int = 200) -> None:
    """Generates a picture and waits until it is done."""
    await page.fill("#prompt", prompt)
    await page.fill("#seed", str(seed))
    await page.locator("#status").evaluate("status => { status.textContent = ''; }")  # an earlier picture's
    await page.press("#prompt", "Enter")
    await expect(page.locator("#status")).to_have_text("Done")
    await expect(page.locator("#stage")).to_have_attribute("aria-busy", "false")
