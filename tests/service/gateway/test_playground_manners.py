"""The playground in a real browser: errors, keyboard, themes, narrow screens, API keys and code."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Sequence
from hashlib import sha256
from pathlib import Path

import pytest
from playwright.async_api import Page, expect

from patchforge.service.gateway.app import Gateway
from patchforge.service.messages.samplers import SAMPLERS
from patchforge.service.pb.patchforge.v1 import image_service_pb2 as pb
from patchforge.service.queue import JobQueue
from patchforge.service.settings import Settings
from tests.processes import PYTHON, run
from tests.service.gateway.browser import BROWSER, draw, nameless, playground
from tests.service.gateway.harness import ScriptedWorker, png, running

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")
ROOT = Path(__file__).parents[3]
REFUSED = "the server responded with a status of"  # the browser logs this for every error response


@pytest.fixture
async def page(url: str, worker: ScriptedWorker) -> AsyncIterator[Page]:
    async with playground(url, advanced=True, forgive=REFUSED) as opened:
        yield opened


async def test_what_the_server_refuses_is_said_at_its_field(page: Page) -> None:
    await page.select_option("#model", "tiny-class")
    await page.fill("#class", "unicorn")
    await page.click("#generate")
    await expect(page.get_by_role("alert")).to_contain_text("Class: no such class")
    await expect(page.locator("#class")).to_be_focused()
    await expect(page.locator("#class-row .fault")).to_contain_text("no such class")
    await expect(page.locator("#class")).to_have_attribute("aria-invalid", "true")
    await page.fill("#class", "cat")
    await expect(page.locator("#class")).not_to_have_attribute("aria-invalid", "true")
    await expect(page.get_by_role("alert")).to_be_empty()
    await expect(page.locator(".fault")).to_have_count(0)


async def test_a_refusal_of_the_second_sampler_is_said_at_its_knob(page: Page) -> None:
    await page.check("#compare")
    await page.select_option("#other-sampler", "look_ahead")
    knob = page.locator("#second").get_by_label("Ratio", exact=True)
    await knob.evaluate("input => { input.max = ''; input.value = '99'; }")  # beyond the limit that the browser checks
    await page.fill("#prompt", "a red apple")
    await page.press("#prompt", "Enter")
    await expect(page.get_by_role("alert")).to_contain_text("Ratio: ")
    await expect(knob).to_be_focused()
    await expect(page.locator("#generate")).to_be_enabled()


async def test_a_job_that_fails_says_why(page: Page) -> None:
    await page.fill("#prompt", "fail")
    await page.press("#prompt", "Enter")
    await expect(page.locator("#status")).to_have_text("Failed")
    await expect(page.get_by_role("alert")).to_have_text("the picture is too big")


async def test_a_whole_run_by_keyboard_alone(page: Page) -> None:
    async def tab_to(selector: str) -> None:
        for _ in range(40):
            if await page.locator(f"{selector}:focus").count():
                return
            await page.keyboard.press("Tab")
        raise AssertionError(f"no way to {selector}")

    await tab_to(".skip")
    await tab_to("#theme")
    await tab_to("#prompt")
    await page.keyboard.type("a red apple")
    await tab_to("#presets input")
    await page.keyboard.press("ArrowRight")
    await expect(page.get_by_role("radio", name="Standard")).to_be_checked()
    await tab_to("#seed")
    await page.keyboard.type("200")
    await tab_to("#generate")
    await page.keyboard.press("Enter")
    await expect(page.locator("#status")).to_have_text("Done")
    await tab_to("[name=overlay]")
    await page.keyboard.press("ArrowRight")
    await expect(page.get_by_role("radio", name="Finish map")).to_be_checked()
    await tab_to("#easel canvas")
    await page.keyboard.press("ArrowRight")
    await expect(page.locator("#patch")).to_contain_text("Row 1, column 1")
    await tab_to("#scrubber")
    await page.keyboard.press("Home")
    await expect(page.locator("#place")).to_have_text("Evaluation 1 of 8, 0 % finished")
    await tab_to("#shelf .pick")
    await page.keyboard.press("Enter")
    await expect(page.locator("#status")).to_have_text("Loaded from the gallery")


async def test_every_control_has_a_name(page: Page) -> None:
    await page.check("#compare")
    await draw(page)
    assert await nameless(page) == []


async def test_light_and_dark_follow_the_system_until_someone_chooses(url: str, worker: ScriptedWorker) -> None:
    async def lightness(page: Page) -> int:
        colour = await page.locator("body").evaluate("body => getComputedStyle(body).backgroundColor")
        return int(colour.split("(")[1].split(",")[0])

    async with playground(url, color_scheme="dark") as page:
        assert await lightness(page) < 60
        await page.emulate_media(color_scheme="light")
        assert await lightness(page) > 200
        theme = page.locator("#theme")
        await theme.click()
        await theme.click()
        await expect(theme).to_have_attribute("aria-label", "Theme: dark")
        assert await lightness(page) < 60
        await page.reload()
        await expect(theme).to_have_attribute("aria-label", "Theme: dark")
        assert await lightness(page) < 60


async def test_nothing_sticks_out_of_a_narrow_screen(url: str, worker: ScriptedWorker) -> None:
    async with playground(url, advanced=True, viewport={"width": 360, "height": 740}) as page:
        await page.check("#compare")
        await draw(page)
        assert await page.locator("html").evaluate("html => html.scrollWidth") <= 360


@pytest.mark.parametrize("pictures", [1, 4])
async def test_nothing_jumps_when_a_picture_is_finished(url: str, worker: ScriptedWorker, pictures: int) -> None:
    """On a phone: longer words about the job, and the buttons below a finished picture, have their room before."""
    phone = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
    tops = "all => all.map(each => each.getBoundingClientRect().top + scrollY)"
    async with playground(url, **phone) as page:
        worker.curtain.clear()
        await page.fill("#n", str(pictures))
        await page.fill("#prompt", "a red apple")
        await page.press("#prompt", "Enter")
        await expect(page.locator("#place")).to_have_text("Evaluation 1 of 8, 0 % finished")
        before = await page.locator("figure, dl").evaluate_all(tops)
        worker.curtain.set()
        await expect(page.get_by_role("button", name=f"Edit picture {pictures}")).to_be_visible()
        await expect(page.locator("#status")).to_have_text("Done")
        after = await page.locator("figure, dl").evaluate_all(tops)
        assert after == pytest.approx(before, abs=4)
        assert len(after) == pictures + 1


@pytest.mark.parametrize(("kind", "command"), [("curl", ["bash", "-ec"]), ("python", [sys.executable, "-c"])])
async def test_copied_commands_make_the_same_pictures(
    page: Page, tmp_path: Path, kind: str, command: list[str]
) -> None:
    await page.fill("#n", "2")
    await draw(page, """it's a "red" apple \\ $HOME""", 41)
    await page.get_by_role("radio", name=kind).check(force=True)
    await page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    await page.get_by_role("button", name="Copy").click()
    await expect(page.locator("#copied")).to_have_text("Copied")
    text = await page.evaluate("navigator.clipboard.readText()")
    await run_snippet(command, text, tmp_path)
    assert [(tmp_path / f"picture-{index}.png").read_bytes() for index in (0, 1)] == [png(41), png(42)]


async def test_the_grpc_snippet_makes_the_same_picture(page: Page, tmp_path: Path) -> None:
    await page.select_option("#sampler", "look_ahead")
    await draw(page, "a red apple", 43)
    await page.get_by_role("radio", name="gRPC").check(force=True)
    text = await page.locator("#code").inner_text()
    assert "look_ahead=pb.LookAheadSampler(quantile=0.4, ratio=1.4)" in text
    await run_snippet(PYTHON, text, tmp_path)
    assert (tmp_path / "picture-0.png").read_bytes() == png(43)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_grpc_snippet_names_every_sampler_as_the_protocol_does(name: str) -> None:
    field = pb.Generation.DESCRIPTOR.fields_by_name[name]
    assert field.message_type.name == f"{name.title().replace('_', '')}Sampler"


async def run_snippet(command: Sequence[str], text: str, folder: Path, **variables: str) -> None:
    assert "from service" not in text, "the package is called patchforge, whatever else the checkout offers"
    await asyncio.to_thread(run, *command, text, cwd=folder, **variables)


async def test_a_server_with_keys_asks_for_one(
    settings: Settings, queue: JobQueue, worker: ScriptedWorker, tmp_path: Path
) -> None:
    key = "s3cret"
    locked = settings.model_copy(update={"api_keys": [f"tester:{sha256(key.encode()).hexdigest()}"]})
    async with running(Gateway(locked, queue)) as gateway:
        url = f"http://127.0.0.1:{gateway.http_port}"
        async with playground(url, ready=False, forgive=REFUSED) as page:
            for attempt in ("wrong", key):
                await expect(page.get_by_role("dialog")).to_be_visible()
                await page.get_by_label("API key", exact=True).fill(attempt)
                await page.keyboard.press("Enter")
            await expect(page.locator("#form:not([inert])")).to_be_visible()
            await draw(page)
            for kind, command in (
                ("curl", ["bash", "-ec"]),
                ("Python", PYTHON),
                ("gRPC", PYTHON),
            ):
                await page.get_by_role("radio", name=kind).check(force=True)
                folder = tmp_path / kind
                folder.mkdir()
                await run_snippet(command, await page.locator("#code").inner_text(), folder, PATCHFORGE_API_KEY=key)
                assert (folder / "picture-0.png").read_bytes() == png(200)
            await page.reload()
            await expect(page.locator("#form:not([inert])")).to_be_visible()
