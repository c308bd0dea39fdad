"""The playground with the shipped model: previews become the picture, and maps differ from patch to patch."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from PIL import Image, ImageChops
from playwright.async_api import expect

from tests.e2e.conftest import Served
from tests.processes import run
from tests.service.gateway.browser import BROWSER, draw, playground

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")


async def test_a_real_picture_settles_and_can_be_made_again(served: Served, tmp_path: Path) -> None:
    async with playground(served.http) as page:
        await draw(page, "grinning face", 3)
        share = int((await page.locator("[data-part=saved]").inner_text()).removesuffix(" %"))
        assert 0 < share < 100
        canvas = page.locator("#easel canvas")
        await page.get_by_role("radio", name="Finish map").check(force=True)
        await canvas.focus()
        readings = set()
        for key in ["ArrowRight", "ArrowDown"] * 15:  # across the outline, twice
            await canvas.press(key)
            readings.add((await page.locator("#patch").inner_text()).split(" · ")[2])
        assert len(readings) > 1  # easy patches were finished before hard ones
        async with page.expect_download() as download:
            await page.get_by_role("link", name="Save picture 1").click()
        await (await download.value).save_as(tmp_path / "saved.png")
        await page.get_by_role("radio", name="curl").check(force=True)
        text = await page.locator("#code").inner_text()
    await asyncio.to_thread(run, "bash", "-ec", text, cwd=tmp_path)
    assert (tmp_path / "picture-0.png").read_bytes() == (tmp_path / "saved.png").read_bytes()


async def test_marked_patches_are_drawn_anew_and_the_others_kept_to_the_pixel(served: Served, tmp_path: Path) -> None:
    """Edits a picture that was just drawn, by mouse; the work for other patches is saved."""

    async def saved(name: str) -> Image.Image:
        async with page.expect_download() as download:
            await page.get_by_role("link", name="Save picture 1").click()
        await (await download.value).save_as(tmp_path / name)
        return Image.open(tmp_path / name).convert("RGB")

    async with playground(served.http) as page:
        await draw(page, "grinning face", 3)
        before = await saved("before.png")
        await page.get_by_role("button", name="Edit picture 1").click()
        canvas = page.locator("#mask")
        await expect(canvas).to_be_focused()
        await canvas.hover(position={"x": 5, "y": 5})
        box = await canvas.bounding_box()
        assert box is not None
        await page.mouse.down()  # at the upper left, then over seven more of the sixteen patches in the row
        await page.mouse.move(box["x"] + box["width"] * 7.5 / 16, box["y"] + 5, steps=20)
        await page.mouse.up()
        await expect(page.locator("#marked")).to_contain_text("8 of 256 patches marked")
        await draw(page, "red heart", 4)
        after = await saved("after.png")
        share = int((await page.locator("[data-part=saved]").inner_text()).removesuffix(" %"))
    assert share > 70, "248 of 256 patches were known"
    differing = ImageChops.difference(before, after).getbbox()
    assert differing is not None
    assert differing[2] <= 128
    assert differing[3] <= 16


async def test_two_samplers_differ_in_work_and_pixels(served: Served) -> None:
    async with playground(served.http, advanced=True) as page:
        await page.check("#compare")
        await page.select_option("#sampler", "euler")
        await page.select_option("#other-sampler", "multistep")
        await draw(page, "grinning face", 3)
        await expect(page.locator("#verdict")).to_contain_text("Multistep did the same work as Euler")
        await expect(page.locator("#verdict")).to_contain_text("PSNR between the pictures: ")
