"""Pictures of the playground as people see it: on a desktop and a phone, in light and dark, in every state.

`make screenshots` starts a server with the shipped models, and writes all of them to screenshots/, to be looked at, and
those that the documentation shows to docs/images/.
"""

from __future__ import annotations

import asyncio
import re
import tempfile
from collections.abc import Awaitable, Callable
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.async_api import Page, expect

from tests.e2e.conftest import start
from tests.processes import ROOT
from tests.service.gateway.browser import draw, playground

DEVICES: dict[str, dict[str, Any]] = {
    "desktop": {"viewport": {"width": 1280, "height": 1130}},
    "phone": {
        "viewport": {"width": 390, "height": 844},
        "device_scale_factor": 2,
        "is_mobile": True,
        "has_touch": True,
    },
}
SCHEMES = ("light", "dark")
SHOWN = {
    ("run", "desktop", "light"): "playground.png",
    ("run", "desktop", "dark"): "playground-dark.png",
    ("run", "phone", "light"): "playground-phone.png",
    ("run", "phone", "dark"): "playground-phone-dark.png",
}
"""State, device and scheme → the file in docs/images."""


async def begin(page: Page) -> None:
    """As it opens."""


async def run(page: Page) -> None:
    """Looking back at the middle of a run, with some pictures in the gallery."""
    await page.select_option("#model", "emoji-text")
    for prompt in ("hamburger, 3d", "automobile, noto", "grinning face, 3d", "panda face, noto"):
        await draw(page, prompt, 7)
    scrubber, place = page.locator("#scrubber"), page.locator("#place")
    while not re.search(r" [2-7]\d % finished|ion 1 of", await place.inner_text()):
        await scrubber.press("ArrowLeft")
    await scrubber.blur()


async def four(page: Page) -> None:
    """Several pictures of one job."""
    await page.fill("#n", "4")
    await draw(page, "tiger face", 5)


async def paint(page: Page) -> None:
    """Painting on a picture."""
    await draw(page, "grinning face", 4)
    await page.get_by_role("button", name="Edit picture 1").click(force=True)
    await expect(page.locator("#mask")).to_be_focused()
    box = await page.locator("#mask").bounding_box()
    assert box is not None
    await page.mouse.move(box["x"] + box["width"] * 0.2, box["y"] + box["height"] * 0.2)
    await page.mouse.down()
    await page.mouse.move(box["x"] + box["width"] * 0.8, box["y"] + box["height"] * 0.35, steps=2)
    await page.mouse.up()


async def compare(page: Page) -> None:
    """Two samplers' finish maps, and all settings."""
    await page.locator("summary").click()
    await page.check("#compare")
    await page.select_option("#other-sampler", "dual_loop")
    await draw(page, "grinning face", 4)
    await page.get_by_role("radio", name="Finish map").check(force=True)


async def classes(page: Page) -> None:
    """A class model's classes to pick from."""
    await page.select_option("#model", "emoji-class")
    await page.fill("#class", "face")


async def away(page: Page) -> None:
    """The server has gone."""
    await page.route("**/v1/jobs", lambda route: route.abort("connectionrefused"))
    await page.fill("#prompt", "red apple, 3d")
    await page.click("#generate")
    await expect(page.get_by_role("alert")).to_contain_text("does not answer")


STATES: tuple[Callable[[Page], Awaitable[None]], ...] = (begin, run, four, paint, compare, classes, away)


async def photograph(url: str, out: Path) -> None:
    """Write `STATE-DEVICE-SCHEME.png` for each of them to `out`, and to docs/images what belongs there."""
    for state in STATES:
        for device, screen in DEVICES.items():
            for scheme in SCHEMES:
                async with playground(url, color_scheme=scheme, forgive="net::ERR_", **screen) as page:
                    await state(page)
                    await page.mouse.move(0, 0)
                    picture = _reduced(await page.screenshot(animations="disabled"))
                (out / f"{state.__name__}-{device}-{scheme}.png").write_bytes(picture)
                if (state.__name__, device, scheme) in SHOWN:
                    (ROOT / "docs" / "images" / SHOWN[state.__name__, device, scheme]).write_bytes(picture)


def _reduced(picture: bytes) -> bytes:
    """A screenshot in 256 colours: a third of the bytes, and no eye can tell."""
    small = BytesIO()
    Image.open(BytesIO(picture)).convert("RGB").quantize(256, kmeans=2).save(small, "PNG", optimize=True)
    return small.getvalue()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as data:
        served = start(Path(data), PATCHFORGE_PREVIEW_INTERVAL_SECONDS="0")
        (ROOT / "screenshots").mkdir(exist_ok=True)
        try:
            asyncio.run(photograph(served.http, ROOT / "screenshots"))
        finally:
            served.close()
