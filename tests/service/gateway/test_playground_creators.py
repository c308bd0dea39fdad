"""The playground in a real browser, for creators: examples, links, the gallery, and settings out of pictures."""

from __future__ import annotations

import asyncio
import zipfile
from base64 import b64encode
from collections.abc import AsyncIterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from playwright.async_api import Page, expect

from patchforge.model.metadata import save_options
from patchforge.service.messages.events import Completed, PatchesFinished, Started
from patchforge.service.messages.schemas import SavingsReport
from patchforge.service.queue import Claim, JobQueue
from tests.patience import PATIENCE
from tests.service.gateway.browser import BROWSER, draw, grey, playground, turns
from tests.service.gateway.harness import CARDS, PATCHES, ScriptedWorker, png, preview, report
from tests.service.gateway.pictures import encoded, gradient
from tests.written_settings import written_settings

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")
SETTINGS: dict[str, Any] = {
    "model": "tiny-text",
    "weights_sha256": "0" * 64,
    "prompt": "Äpfel 🍎, red\nand green",
    "negative_prompt": "worms, Würmer",
    "seed": 1234,
    "sampler": {"name": "look_ahead", "quantile": 0.25, "ratio": 2.0},
    "steps": 5,
    "guidance": 2.5,
}
AWAY = "net::ERR_"  # the browser logs this for every request without an answer


@pytest.fixture
async def page(url: str, worker: ScriptedWorker) -> AsyncIterator[Page]:
    async with playground(url, reduced_motion="reduce") as opened:
        yield opened


async def drop(page: Page, data: bytes, kind: str, onto: str = "#stage") -> None:
    """Drops a file onto an element."""
    script = """([data, type, onto]) => {
        const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
        const dataTransfer = new DataTransfer();
        dataTransfer.items.add(new File([bytes], "dropped", { type }));
        const how = { dataTransfer, bubbles: true, cancelable: true };
        document.querySelector(onto).dispatchEvent(new DragEvent("drop", how));
    }"""
    await page.evaluate(script, [b64encode(data).decode(), f"image/{kind}", onto])


def described(output_format: str, **changes: Any) -> bytes:
    """A picture that says how it was made."""
    picture, buffer = gradient(48, 32), BytesIO()
    picture.save(buffer, output_format, **save_options(output_format, picture, SETTINGS | changes))
    return buffer.getvalue()


async def claimed(queue: JobQueue) -> Claim:
    claim = await queue.claim("by hand", ["tiny-text"], block_seconds=PATIENCE)
    assert claim is not None
    await queue.publish(claim, Started(attempt=1, steps=8))
    return claim


async def finish(queue: JobQueue, claim: Claim, picture: bytes, finished_at: int) -> None:
    await queue.store_image(claim, 0, picture)
    told = report(claim.job.request.seed or 0, 1)
    image = told.images[0].model_copy(update={"finished_at": [finished_at] * PATCHES})
    changed: SavingsReport = told.model_copy(update={"images": [image]})
    await queue.finish(claim, Completed(report=changed))


async def test_an_example_becomes_the_prompt(queue: JobQueue, url: str) -> None:
    text = CARDS[0].model_copy(update={"examples": ["a red apple", "a green pear"]})
    await queue.announce("by hand", [text, CARDS[1]])
    async with playground(url) as page:
        await expect(page.locator("#draws")).to_have_text("Draws what the prompt says at 48 × 32 pixels, in 6 patches.")
        await page.get_by_role("button", name="a green pear").click()
        await expect(page.locator("#prompt")).to_have_value("a green pear")
        await page.select_option("#model", "tiny-class")
        await expect(page.locator("#draws")).to_have_text("Draws one of 2 classes at 16 × 16 pixels, in 6 patches.")
        await page.fill("#class", "face")
        classes = page.locator("#class-picker button")
        await expect(classes).to_have_text(["grinning face"])
        await classes.click()
        await expect(page.locator("#class")).to_have_value("grinning face")
        await expect(classes).to_have_text(["cat", "grinning face"])
        await expect(page.get_by_role("button", name="grinning face")).to_have_attribute("aria-pressed", "true")


async def test_a_further_size_of_the_model_is_offered_and_shown_in_its_own_patches(queue: JobQueue, url: str) -> None:
    await queue.announce("by hand", [CARDS[0].model_copy(update={"sizes": [(64, 16)]})])
    async with playground(url, advanced=True, reduced_motion="reduce") as page:
        await expect(page.locator("#draws")).to_have_text(
            "Draws what the prompt says at 48 × 32 pixels, in 6 patches. Also at 64 × 16."
        )
        await page.fill("#prompt", "a red apple")
        await page.select_option("#size", "64 × 16")
        await page.press("#prompt", "Enter")
        claim = await claimed(queue)
        assert claim.job.request.asked_size == (64, 16)
        seen = preview(0, 4).model_copy(update={"times": [1.0, 0.5, 0.5, 0.5], "finished_share": 0.25, "grid": [1, 4]})
        await queue.publish(claim, seen)
        await expect(page.locator("#place")).to_have_text("Evaluation 4 of 8, 25 % finished")
        more = {"patches": [3], "times": [0.5], "finished_share": 0.5, "grid": [1, 4]}
        await queue.publish(claim, PatchesFinished(index=0, evaluation=5, evaluations=8, **more))
        await expect(page.locator("#place")).to_have_text("Evaluation 5 of 8, 50 % finished")
        canvas = page.locator("#easel canvas")
        await canvas.focus()
        for key in ("ArrowDown", *["ArrowRight"] * 5):
            await canvas.press(key)
        await expect(page.locator("#patch")).to_have_text("Row 1, column 4 · t = 1 · finished after evaluation 5")
        told = report(claim.job.request.seed or 0, 1)
        image = told.images[0].model_copy(update={"finished_at": [4, 7, 8, 5], "difficulty": [0.5] * 4})
        changed = told.model_copy(update={"images": [image], "grid_rows": 1, "grid_columns": 4, "patches": 4})
        await queue.store_image(claim, 0, png(9))
        await queue.finish(claim, Completed(report=changed))
        await expect(page.locator("#status")).to_have_text("Done")
        await canvas.press("ArrowLeft")
        await expect(page.locator("#patch")).to_contain_text("Row 1, column 3 · t = 1 · finished after evaluation 8")
        await page.reload()
        await canvas.focus()
        await canvas.press("ArrowDown")
        await expect(page.locator("#patch")).to_contain_text("Row 1, column 1 · t = 1 · finished after evaluation 4")


@pytest.mark.parametrize("viewport", [{"width": 1280, "height": 720}, {"width": 390, "height": 740}])
async def test_that_the_server_is_away_is_said_in_view(url: str, worker: ScriptedWorker, viewport: Any) -> None:
    async with playground(url, forgive=AWAY, viewport=viewport) as page:
        await page.fill("#prompt", "a red apple")
        await page.route("**/v1/jobs", lambda route: route.abort("connectionrefused"))
        await page.click("#generate")
        alert = page.get_by_role("alert")
        await expect(alert).to_contain_text("The server does not answer")
        await expect(alert).to_be_in_viewport(ratio=1)
        await expect(page.locator("#generate")).to_be_enabled()
        await page.get_by_role("button", name="Dismiss the message").click()
        await expect(alert).to_be_empty()


async def test_a_page_that_waits_for_its_server_says_so(url: str, worker: ScriptedWorker) -> None:
    async with playground(url, ready=False, forgive=AWAY) as page:
        await page.route("**/v1/models", lambda route: route.abort("connectionrefused"))
        await page.reload()
        await expect(page.get_by_role("alert")).to_contain_text("The server does not answer")
        await page.unroute("**/v1/models")
        await expect(page.locator("#form:not([inert])")).to_be_visible()
        await expect(page.get_by_role("alert")).to_be_empty()


async def test_an_error_unfolds_the_setting_it_is_about(page: Page) -> None:
    await expect(page.locator("#steps")).to_be_hidden()
    await page.locator("#steps").evaluate("input => { input.value = '0'; }")
    await page.fill("#prompt", "a red apple")
    await page.click("#generate")
    await expect(page.locator("#steps")).to_be_focused()


async def test_a_link_opens_with_its_settings(url: str, worker: ScriptedWorker) -> None:
    wanted = "#model=tiny-text&prompt=a+red+apple&seed=7&n=2&quality=draft&guidance=2&versus=euler&later=1"
    async with playground(url, wanted, advanced=True) as page:
        await expect(page.locator("#prompt")).to_have_value("a red apple")
        for name, value in {"seed": "7", "n": "2", "guidance": "2", "other-sampler": "euler"}.items():
            await expect(page.locator(f"#{name}")).to_have_value(value)
        await expect(page.get_by_role("radio", name="Draft")).to_be_checked()


@pytest.mark.parametrize(
    "wanted", ["#n=99&seed=-1&steps=abc&sampler=unknown", "#=&&&%ff", "#model=gone&class_label=cat"]
)
async def test_a_link_that_makes_no_sense_breaks_nothing(url: str, worker: ScriptedWorker, wanted: str) -> None:
    async with playground(url, wanted) as page:
        await page.fill("#n", "1")
        if "cat" in wanted:
            await expect(page.locator("#class")).to_have_value("cat")
        else:
            await draw(page)


async def test_a_reload_brings_back_the_form_and_the_picture(page: Page) -> None:
    await page.locator("summary").click()
    await page.select_option("#sampler", "look_ahead")
    await page.get_by_label("Ratio", exact=True).fill("2")
    await draw(page, "a red apple", 200)
    await page.fill("#prompt", "a green pear")
    await page.reload()
    await expect(page.locator("#prompt")).to_have_value("a green pear")
    await expect(page.locator("#seed")).to_have_value("200")
    await expect(page.locator("#sampler")).to_have_value("look_ahead")
    await expect(page.locator('#first [data-field="sampler.ratio"]')).to_have_value("2")
    await expect(page.locator("#place")).to_have_text("Evaluation 8 of 8, 100 % finished")
    await turns(page, 200)


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
async def test_a_dropped_picture_gives_its_settings_back(page: Page, kind: str) -> None:
    await drop(page, described(kind), kind)
    await expect(page.locator("#prompt")).to_have_value(SETTINGS["prompt"])
    await expect(page.locator("#negative")).to_have_value("worms, Würmer")
    for name, value in {"seed": "1234", "steps": "5", "guidance": "2.5", "sampler": "look_ahead", "size": ""}.items():
        await expect(page.locator(f"#{name}")).to_have_value(value)
    await expect(page.locator('#first [data-field="sampler.ratio"]')).to_have_value("2")
    await expect(page.locator("#chosen")).to_be_hidden()


async def test_a_picture_of_another_tool_gives_what_it_has(page: Page) -> None:
    texts, buffer = PngInfo(), BytesIO()
    line = 'Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 42, Size: 512x768, Lora hashes: "a: 1, b: 2", Model: x'
    texts.add_text("parameters", f"a castle,\nby the sea\nNegative prompt: people\n{line}", zip=True)
    gradient(8, 8).save(buffer, "png", pnginfo=texts)
    await drop(page, buffer.getvalue(), "png")
    await expect(page.locator("#prompt")).to_have_value("a castle,\nby the sea")
    await expect(page.locator("#negative")).to_have_value("people")
    for name, value in {"seed": "42", "steps": "20", "guidance": "7", "width": "512", "height": "768"}.items():
        await expect(page.locator(f"#{name}")).to_have_value(value)
    await expect(page.get_by_role("alert")).to_contain_text("no model named x")


@pytest.mark.parametrize("damage", ["tail", "header", "offsets"])
@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
async def test_damaged_settings_are_no_settings(page: Page, kind: str, damage: str) -> None:
    data = bytearray(described(kind))
    if damage == "tail":
        del data[60:]
    else:
        place = 8 if damage == "header" else 40
        data[place : place + 60] = b"\xff" * 60
    found = await page.evaluate(
        """async (data) => {
            const { readSettings } = await import("/playground/metadata.js");
            return readSettings(new Blob([Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0))]));
        }""",
        b64encode(data).decode(),
    )
    assert found is None or found["prompt"] == SETTINGS["prompt"]


async def test_a_picture_dropped_on_its_field_is_one_to_start_from(page: Page) -> None:
    await drop(page, described("png"), "png", "#drop")
    await expect(page.locator("#mask")).to_be_visible()
    await page.get_by_role("button", name="Use its settings").click()
    await expect(page.locator("#prompt")).to_have_value(SETTINGS["prompt"])
    await expect(page.locator("#mask")).to_be_hidden()
    await drop(page, encoded(gradient(48, 32), "png"), "png")  # has no settings
    await expect(page.locator("#mask")).to_be_visible()
    await expect(page.locator("#settings-found")).to_be_hidden()


async def test_every_patch_that_a_fast_brush_crosses_is_marked(page: Page) -> None:
    await page.evaluate("window.scrollTo(0, 0)")
    await drop(page, encoded(gradient(48, 32), "png"), "png")
    await expect(page.locator("#mask")).to_be_visible()
    box = await page.locator("#mask").bounding_box()
    assert box is not None
    assert box["width"] > 300, "it is the large picture that is painted on"
    await page.mouse.move(box["x"] + box["width"] / 6, box["y"] + box["height"] / 4)
    await page.mouse.down()
    await page.mouse.move(box["x"] + box["width"] * 5 / 6, box["y"] + box["height"] * 0.3, steps=1)
    await page.mouse.up()
    await expect(page.locator("#marked")).to_contain_text("3 of 6 patches marked")


@pytest.mark.parametrize(
    ("line", "cells"),
    [
        ([[0.5, 0.5], [0.5, 0.5]], [[0, 0]]),
        ([[0.5, 0.5], [3.5, 0.5]], [[0, 0], [1, 0], [2, 0], [3, 0]]),
        ([[2.5, 0.5], [0.5, 0.5]], [[2, 0], [1, 0], [0, 0]]),
        ([[0.5, 0.9], [2.5, 1.1]], [[0, 0], [1, 0], [1, 1], [2, 1]]),
        ([[1.0, 1.0], [0.2, 0.4]], [[1, 1], [1, 0], [0, 0]]),
    ],
)
async def test_the_cells_of_a_line(page: Page, line: Any, cells: Any) -> None:
    found = await page.evaluate('async (line) => (await import("/playground/mask.js")).crossed(...line)', line)
    assert found == cells


async def test_a_short_run_without_previews_can_be_replayed(url: str, queue: JobQueue) -> None:
    await queue.announce("by hand", CARDS)
    async with playground(url, reduced_motion="reduce") as page:
        await page.fill("#prompt", "a red apple")
        await page.press("#prompt", "Enter")
        claim = await claimed(queue)
        for evaluation, patches in ((1, [0, 1]), (2, [2, 3, 4])):
            share = {1: 1 / 3, 2: 5 / 6}[evaluation]
            arrived = {"patches": patches, "times": [0.5] * len(patches), "finished_share": share}
            await queue.publish(claim, PatchesFinished(index=0, evaluation=evaluation, evaluations=3, **arrived))
        await expect(page.locator("#place")).to_have_text("Evaluation 2 of 3, 83 % finished")
        await finish(queue, claim, png(200), 3)
        await expect(page.locator("#place")).to_have_text("Evaluation 3 of 3, 100 % finished")
        await page.get_by_role("slider", name="Previews").press("Home")
        await expect(page.locator("#place")).to_have_text("Evaluation 1 of 3, 33 % finished")
        await turns(page, 200)  # its finished patches, of the picture
        await page.get_by_role("button", name="Replay").click()
        await expect(page.locator("#place")).to_have_text("Evaluation 3 of 3, 100 % finished")


async def test_a_replay_takes_long_enough_to_follow(page: Page) -> None:
    script = 'async (frames) => (await import("/playground/stage.js")).pace(frames)'
    paces = {frames: await page.evaluate(script, frames) for frames in (2, 8, 20, 300)}
    assert paces[2] >= 500
    assert all(pace * frames >= 1400 for frames, pace in paces.items())
    assert paces[300] * 300 <= 30_000


async def test_two_finish_maps_are_on_one_scale(url: str, queue: JobQueue) -> None:
    await queue.announce("by hand", CARDS)
    async with playground(url, advanced=True, reduced_motion="reduce") as page:
        await page.check("#compare")
        await page.fill("#prompt", "a red apple")
        await page.press("#prompt", "Enter")
        for finished_at in (4, 8):
            await finish(queue, await claimed(queue), png(200), finished_at)
        await expect(page.locator("#status")).to_have_text("Done")
        await page.get_by_role("radio", name="Finish map").check(force=True)
        await expect(page.locator("#scale")).to_contain_text("finished early (after evaluation 4)")
        await expect(page.locator("#scale")).to_contain_text("late (after evaluation 8)")
        async with asyncio.timeout(PATIENCE):  # they are painted when they have been decoded
            while 0 in (seen := {max(0, await grey(page, pane)) for pane in (0, 1)}) or len(seen) < 2:
                await page.wait_for_timeout(50)


async def test_the_bar_shows_the_share_that_the_figure_says(page: Page) -> None:
    await draw(page)
    await expect(page.locator("[data-part=saved]")).to_have_text("33 %")
    assert float((await page.locator("[data-part=bar]").evaluate("bar => bar.style.width"))[:-1]) == pytest.approx(
        100 / 3, abs=0.01
    )


async def test_one_picture_or_all_can_be_downloaded_from_the_gallery(page: Page, tmp_path: Path) -> None:
    await draw(page, "a red apple", 200)
    await page.fill("#n", "2")
    await draw(page, "Ä/pfel: grün?", 100)
    await draw(page, "Ä/pfel: grün?", 100)

    async def saved(name: str) -> Path:
        async with page.expect_download() as download:
            await page.get_by_role("button", name=name).first.click(force=True)
        value = await download.value
        await value.save_as(tmp_path / value.suggested_filename)
        return tmp_path / value.suggested_filename

    one = await saved("Download a red apple")
    assert (one.name, one.read_bytes()) == ("a-red-apple-200.png", png(200))
    with zipfile.ZipFile(await saved("Download all")) as archive:
        assert archive.testzip() is None
        names = ["ä-pfel-grün-100.png", "ä-pfel-grün-101.png", "ä-pfel-grün-100 (2).png", "ä-pfel-grün-101 (2).png"]
        assert archive.namelist() == [*names, "a-red-apple-200.png"]
        assert archive.read(names[1]) == png(101)


async def test_a_large_copy_keeps_the_settings(url: str, queue: JobQueue, tmp_path: Path) -> None:
    await queue.announce("by hand", CARDS)
    async with playground(url) as page:
        await page.fill("#prompt", "a red apple")
        await page.press("#prompt", "Enter")
        await finish(queue, await claimed(queue), described("png"), 8)
        await expect(page.locator("#status")).to_have_text("Done")
        async with page.expect_download() as download:
            await page.get_by_role("button", name="Save picture 1 in 1024 pixels").click(force=True)
        await (await download.value).save_as(tmp_path / "large.png")
    with Image.open(tmp_path / "large.png") as large:
        assert large.size == (1024, 683)
    assert written_settings((tmp_path / "large.png").read_bytes())[1]["seed"] == 1234


async def test_pictures_of_a_job_appear_as_they_are_finished(url: str, queue: JobQueue) -> None:
    await queue.announce("by hand", CARDS)
    async with playground(url, reduced_motion="reduce") as page:
        await page.fill("#n", "2")
        await page.fill("#prompt", "a red apple")
        await page.press("#prompt", "Enter")
        claim = await claimed(queue)
        await queue.store_image(claim, 0, png(200))
        await turns(page, 200)
        await expect(page.get_by_role("link", name="Save picture 1")).to_be_attached()
        await page.click("#cancel")


async def test_a_negative_prompt_and_previews_of_every_picture_are_asked_for(
    page: Page, worker: ScriptedWorker, queue: JobQueue
) -> None:
    await page.get_by_label("Negative prompt").fill("worms")
    await page.fill("#n", "4")
    await draw(page, "a red apple", 200)
    request = (await queue.get(await worker.next_job())).request
    assert (request.prompt, request.negative_prompt, request.partial_images) == ("a red apple", "worms", 2)
    await expect(page.locator("[data-part=settings]")).to_contain_text("not: worms")
    await expect(page.locator("#code")).to_contain_text('"negative_prompt":"worms"')
    await page.reload()
    await expect(page.get_by_label("Negative prompt")).to_have_value("worms")
    await page.select_option("#model", "tiny-class")
    await page.fill("#class", "cat")
    await page.click("#generate")
    assert (await queue.get(await worker.next_job())).request.negative_prompt is None


async def test_what_a_link_holds_is_read_back_as_it_was(page: Page) -> None:
    request = {
        "model": "m",
        "prompt": "a & b = c\n#%é",
        "negative_prompt": "-",
        "n": 2,
        "seed": 7,
        "sampler": {"name": "x", "on": True, "q": 0.5},
    }
    requests = [request, {**request, "sampler": {"name": "y", "mode": "fast"}}]
    script = """async (requests) => {
        const { fromHash, toHash } = await import("/playground/link.js");
        return fromHash("#" + toHash(requests));
    }"""
    assert await page.evaluate(script, requests) == requests
