"""The playground in a real browser: pictures to start from, patches marked on them, and sizes."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from playwright.async_api import FilePayload, Page, expect

from patchforge.service.messages.fit import Fit, place
from patchforge.service.messages.samplers import Adaptive
from patchforge.service.messages.schemas import GenerationRequest, Job
from patchforge.service.queue import JobQueue
from tests.service.gateway.browser import BROWSER, draw, nameless, playground
from tests.service.gateway.harness import CARDS, COLUMNS, PATCHES, ROWS, ScriptedWorker, png
from tests.service.gateway.pictures import decoded, encoded, gradient
from tests.service.gateway.test_playground_manners import REFUSED, run_snippet

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")
WIDTH, HEIGHT = 100, 70  # of the picture sent: patches are not whole pixels


@pytest.fixture
async def page(url: str, worker: ScriptedWorker) -> AsyncIterator[Page]:
    async with playground(url, advanced=True, forgive=REFUSED, reduced_motion="reduce") as opened:
        yield opened


async def choose(page: Page, picture: bytes | None = None, kind: str = "png") -> None:
    """Gives the page a picture to start from."""
    data = picture if picture is not None else encoded(gradient(WIDTH, HEIGHT), kind)
    await page.locator("#file").set_input_files(FilePayload(name=f"mine.{kind}", mimeType=f"image/{kind}", buffer=data))


async def edit(page: Page) -> None:
    """Gives the page a valid picture and waits until it is loaded."""
    await choose(page)
    await expect(page.locator("#mask")).to_be_visible()


async def mark(page: Page, *patches: tuple[int, int], rows: int = ROWS, columns: int = COLUMNS) -> None:
    """Marks patches, each by row and column, with a click."""
    canvas = page.locator("#mask")
    box = await canvas.bounding_box()
    assert box is not None
    for row, column in patches:
        middle = (column + 0.5) * box["width"] / columns, (row + 0.5) * box["height"] / rows
        await canvas.click(position={"x": middle[0], "y": middle[1]})


async def job_on_stage(page: Page, queue: JobQueue) -> Job:
    """The job of the newest picture."""
    script = """async () => {
        const { History } = await import("/playground/history.js");
        const [newest] = await (await History.open()).all();
        return newest.runs[0].id;
    }"""
    return await queue.get(await page.evaluate(script))


async def test_marked_patches_may_change_and_no_pixel_of_the_others(page: Page, queue: JobQueue) -> None:
    await edit(page)
    await mark(page, (0, 1), (1, 2), (0, 0))
    await mark(page, (0, 0))  # unmarked
    await expect(page.locator("#marked")).to_contain_text("2 of 6 patches marked")
    await expect(page.locator("#strength")).to_have_value("1")
    await draw(page)
    job = await job_on_stage(page, queue)
    assert (job.request.width, job.request.height, job.request.strength) == (WIDTH, HEIGHT, 1)
    source = await queue.source(job.id)
    assert decoded(source.image).tobytes() == gradient(WIDTH, HEIGHT).tobytes()
    changes = decoded(source.mask or b"")
    pixels = [(x, y) for y in range(HEIGHT) for x in range(WIDTH) if changes.getpixel((x, y))]
    touched = {(y * ROWS // HEIGHT, x * COLUMNS // WIDTH) for x, y in pixels}
    assert touched == {(0, 1), (1, 2)}
    assert len(pixels) > 0.9 * 2 * WIDTH * HEIGHT / PATCHES, "and nearly all pixels of the marked patches"


async def changing(queue: JobQueue, job: Job) -> tuple[tuple[int, int], tuple[int, int, int, int] | None]:
    """The size of the finished picture, and the box of it that may change."""
    changes = decoded((await queue.source(job.id)).mask or b"")
    return changes.size, changes.getbbox()


async def test_painting_is_on_the_patches_of_the_size_that_is_drawn(
    url: str, queue: JobQueue, worker: ScriptedWorker
) -> None:
    """The model draws 48×32 in 2 × 3 patches, and 32×32 in 2 × 2."""
    worker.cards = [CARDS[0].model_copy(update={"sizes": [(32, 32)]})]
    await worker.queue.announce(worker.name, worker.cards)
    async with playground(url, advanced=True, reduced_motion="reduce") as page:
        await choose(page, encoded(gradient(64, 64)))
        await expect(page.locator("#mask")).to_be_visible()
        marked, box = page.locator("#marked"), page.locator("#mask")
        await mark(page, (0, 1), rows=2, columns=2)
        await expect(marked).to_contain_text("1 of 4 patches marked")
        await draw(page)
        assert await changing(queue, await job_on_stage(page, queue)) == ((64, 64), (32, 0, 64, 32))
        await page.get_by_role("button", name="Paint").click()
        await expect(box).to_be_visible()
        await page.select_option("#size", "32 × 32")
        await expect(marked).to_contain_text("1 of 4 patches marked")  # the same patches
        await page.select_option("#size", "96 × 64")
        await expect(marked).to_have_text("Without marks, the whole picture may change.")
        sides = await box.bounding_box()
        assert sides is not None
        assert sides["width"] / sides["height"] == pytest.approx(1.5, rel=0.02)
        await mark(page, (0, 0), rows=2, columns=3)
        await expect(marked).to_contain_text("1 of 6 patches marked")
        await draw(page, "a pear", 78)
        wanted = ((96, 64), (16, 0, 32, 32))  # beside white bars of 16 pixels
        assert await changing(queue, await job_on_stage(page, queue)) == wanted
        await page.reload()
        await page.get_by_role("button", name="a pear, Adaptive").click()
        await expect(page.locator("#size")).to_have_value("96 × 64")
        await expect(marked).to_contain_text("1 of 6 patches marked")
        await page.get_by_role("button", name="Paint").click()
        await expect(box).to_be_visible()
        await page.select_option("#size", "other")
        for side in ("width", "height"):
            await page.fill(f"#{side}", "40")
        await page.press("#height", "Tab")
        await mark(page, (1, 0), (1, 1), rows=2, columns=2)
        await expect(marked).to_contain_text("2 of 4 patches marked")


async def test_what_lies_beside_the_picture_cannot_be_marked(page: Page, queue: JobQueue) -> None:
    await choose(page, encoded(gradient(64, 192)))
    await page.select_option("#size", "96 × 64")
    await page.get_by_role("button", name="All", exact=True).press("Enter")
    await expect(page.locator("#marked")).to_contain_text("2 of 6 patches marked")
    await mark(page, (0, 0), (1, 2))
    await expect(page.locator("#marked")).to_contain_text("2 of 6 patches marked")


async def test_grids_and_places_are_those_that_workers_choose(page: Page) -> None:
    card = CARDS[0].model_copy(update={"sizes": [(32, 32), (16, 32), (96, 64)]})
    told = card.model_dump(mode="json")
    script = """async ([card, asked, picture]) => {
        const { drawnGrid, placed } = await import("/playground/size.js");
        const place = placed(picture, asked);
        return [drawnGrid(card, asked), [place.left, place.top, place.left + place.width, place.top + place.height]];
    }"""
    for width, height in (
        (48, 32),
        (96, 64),
        (49, 32),
        (40, 40),
        (20, 40),
        (2048, 64),
        (64, 2048),
        (1000, 668),
        (16, 16),
    ):
        request = GenerationRequest(prompt="x", width=width, height=height)
        for picture in ((100, 70), (70, 101), (48, 32)):
            sizes = [{"width": size[0], "height": size[1]} for size in ((width, height), picture)]
            grid, box = await page.evaluate(script, [told, *sizes])
            assert tuple(grid) == card.drawn_grid(request), (width, height)
            assert tuple(box) == place(picture, (width, height), Fit.CONTAIN).place, (width, height, picture)


async def test_patches_are_marked_by_keyboard_too(page: Page, queue: JobQueue) -> None:
    await edit(page)
    canvas = page.locator("#mask")
    await canvas.focus()
    for key in ("ArrowRight", " ", "Shift+ArrowDown"):
        await canvas.press(key)
    await expect(page.locator("#marked")).to_have_text("Row 2, column 2 may change · 2 of 6 patches marked.")
    await page.get_by_role("button", name="Invert").press("Enter")
    await expect(page.locator("#marked")).to_contain_text("4 of 6 patches marked")
    await page.get_by_role("button", name="All", exact=True).press("Enter")
    await expect(page.locator("#marked")).to_contain_text("6 of 6")
    await page.get_by_role("button", name="None").press("Enter")
    await expect(page.locator("#strength")).to_have_value("0.6")
    await draw(page)
    job = await job_on_stage(page, queue)
    assert (job.request.mask, job.request.strength) == (None, 0.6)


async def test_only_the_sampler_that_can_start_from_a_picture_is_offered(page: Page, queue: JobQueue) -> None:
    await expect(page.locator("#sampler")).to_have_value("dual_loop")
    await choose(page, kind="jpeg")
    await expect(page.locator("#sampler")).to_have_value("adaptive")
    await expect(page.get_by_role("radio", name="Standard")).to_be_checked()
    await expect(page.locator('#sampler option[value="euler"]')).to_be_disabled()
    await page.check("#compare")
    await page.locator("#second").get_by_label("Exact").check()
    await page.fill("#strength", "0.3")
    await draw(page)
    job = await job_on_stage(page, queue)
    assert isinstance(job.request.sampler, Adaptive)
    assert job.request.strength == 0.3
    await expect(page.locator("[data-part=settings]").nth(1)).to_contain_text("exact · strength 0.3 · 100 × 70 pixels")
    await page.get_by_role("button", name="Remove", exact=True).click()
    await expect(page.locator('#sampler option[value="euler"]')).to_be_enabled()
    await expect(page.locator("#file")).to_be_focused()


@pytest.mark.parametrize(
    ("kind", "command"),
    [("curl", ["bash", "-ec"]), ("Python", [sys.executable, "-c"]), ("gRPC", [sys.executable, "-c"])],
)
async def test_the_commands_start_from_the_same_files(
    page: Page, queue: JobQueue, worker: ScriptedWorker, tmp_path: Path, kind: str, command: list[str]
) -> None:
    await edit(page)
    await mark(page, (1, 1))
    await draw(page, "it's an apple", 44)
    drawn = await job_on_stage(page, queue)
    await page.get_by_role("radio", name=kind).check(force=True)
    for name in ("source.png", "mask.png"):
        async with page.expect_download() as download:
            await page.get_by_role("link", name=name).click()
        await (await download.value).save_as(tmp_path / name)
    assert await worker.next_job() == drawn.id
    await run_snippet(command, await page.locator("#code").inner_text(), tmp_path)
    again = await queue.get(await worker.next_job())
    assert (tmp_path / "picture-0.png").read_bytes() == png(44)
    wanted = drawn.request.model_dump(exclude={"previews"})
    assert again.request.model_dump(exclude={"previews"}) == wanted, "including the digests of both files"


async def test_a_finished_picture_can_be_edited_and_history_knows_what_it_came_from(
    page: Page, queue: JobQueue
) -> None:
    await draw(page, seed=77)
    await page.locator("figure").hover()
    await page.evaluate("scrollTo(0, 400)")
    await page.get_by_role("button", name="Edit picture 1").dispatch_event("click")
    await expect(page.locator("#mask")).to_be_focused()
    await expect(page.locator("#editor")).to_be_in_viewport(ratio=0.99)
    await mark(page, (0, 2))
    await page.select_option("#size", "96 × 64")
    await draw(page, "a pear", 78)
    job = await job_on_stage(page, queue)
    assert (job.request.width, job.request.height) == (96, 64)
    await page.get_by_role("button", name="a red apple").first.click()
    await expect(page.locator("#editor")).to_be_hidden()
    await expect(page.locator("#files")).to_be_hidden()
    await expect(page.locator("#size")).to_have_value("")
    await page.reload()
    await page.get_by_role("button", name="a pear, Adaptive").click()
    await expect(page.locator("#marked")).to_contain_text("1 of 6 patches marked")
    await expect(page.locator("#size")).to_have_value("96 × 64")
    await expect(page.locator("#strength")).to_have_value("1")
    await expect(page.locator("#files")).to_contain_text("source.png and mask.png")


async def test_a_picture_is_dropped_or_pasted_and_other_files_are_not_taken(page: Page) -> None:
    script = """async ([kind, type, bytes]) => {
        const transfer = new DataTransfer();
        transfer.items.add(new File([new Uint8Array(bytes)], "x", { type }));
        const options = { bubbles: true, cancelable: true };
        const target = kind === "drop" ? document.getElementById("seed") : document.body;
        target.dispatchEvent(kind === "drop" ? new DragEvent("drop", { ...options, dataTransfer: transfer })
            : new ClipboardEvent("paste", { ...options, clipboardData: transfer }));
    }"""
    picture = list(encoded(gradient(20, 20)))
    for kind, words in (("application/pdf", "PNG, WebP or JPEG"), ("image/png", "not a valid picture")):
        await page.evaluate(script, ["drop", kind, [1, 2, 3]])
        await expect(page.locator("#source-problem")).to_contain_text(words)
        await expect(page.locator("#editor")).to_be_hidden()
    for kind in ("drop", "paste"):
        await page.evaluate(script, [kind, "image/png", picture])
        await expect(page.locator("#editor")).to_be_visible()
        await expect(page.locator("#source-problem")).to_be_empty()
        await page.get_by_role("button", name="Remove", exact=True).click()


async def test_a_large_picture_is_scaled_down_before_it_is_sent(page: Page, queue: JobQueue) -> None:
    await choose(page, encoded(gradient(2400, 1200), "jpeg"), "jpeg")
    await draw(page)
    source = decoded((await queue.source((await job_on_stage(page, queue)).id)).image)
    assert source.size == (1448, 724)


async def test_the_editor_s_controls_have_names_and_fit_a_narrow_screen(url: str, worker: ScriptedWorker) -> None:
    async with playground(url, advanced=True, viewport={"width": 360, "height": 740}) as page:
        await choose(page)
        await page.select_option("#size", "other")
        await expect(page.locator("#editor")).to_be_visible()
        assert await nameless(page) == []
        assert await page.locator("html").evaluate("html => html.scrollWidth") <= 360


async def test_sizes(page: Page, queue: JobQueue, http: httpx.AsyncClient) -> None:
    offered = await page.locator("#size option").all_inner_texts()
    assert offered == ["48 × 32", *(f"{size}, enlarged" for size in ("96 × 64", "192 × 128", "384 × 256")), "Other…"]
    await page.select_option("#size", "other")
    await page.fill("#width", "2048")
    await page.fill("#height", "2048")
    await page.fill("#prompt", "a red apple")
    await page.press("#prompt", "Enter")
    await expect(page.get_by_role("alert")).to_contain_text("Height: width times height must be at most 2097152")
    await expect(page.locator("#height")).to_be_focused()
    await page.fill("#height", "64")
    await draw(page)
    job = await job_on_stage(page, queue)
    assert (job.request.width, job.request.height) == (2048, 64)
    ratio = await page.locator("#easel canvas").evaluate("canvas => canvas.style.aspectRatio")
    assert ratio == "2048 / 64"
    await page.get_by_role("radio", name="Python").check(force=True)
    await expect(page.locator("#code")).to_contain_text("width=2048")
    await page.select_option("#model", "tiny-class")
    assert (await page.locator("#size option").all_inner_texts())[0] == "16 × 16"


async def test_a_full_queue_and_workers_that_left_are_said(url: str, http: httpx.AsyncClient, queue: JobQueue) -> None:
    await queue.announce("by hand", CARDS)
    async with playground(url, forgive=REFUSED) as page:
        await page.fill("#prompt", "a red apple")
        waiting = [await http.post("/v1/jobs", json={"prompt": "x", "model": "tiny-text"}) for _ in range(8)]
        await page.press("#prompt", "Enter")
        await expect(page.get_by_role("alert")).to_have_text("too many jobs are waiting (retry in 5 s)")
        await expect(page.locator("#generate")).to_be_enabled()
        await asyncio.gather(*(queue.cancel(job.json()["id"]) for job in waiting))
        await queue.retire("by hand")
        await page.press("#prompt", "Enter")
        await expect(page.get_by_role("alert")).to_have_text("no worker is serving a model (retry in 5 s)")
        await queue.announce("by hand", CARDS)
        await page.press("#prompt", "Enter")
        await expect(page.locator("#status")).to_have_text("Waiting for a worker…")
        await expect(page.get_by_role("alert")).to_be_empty()
        await page.click("#cancel")
        await expect(page.locator("#status")).to_have_text("Cancelled")
