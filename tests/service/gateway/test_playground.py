"""The playground in a real browser, if one is installed: making pictures and looking at them."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import AsyncIterator

import pytest
from playwright.async_api import Page, expect

from patchforge.service.messages.events import PatchesFinished, Preview, Started
from patchforge.service.messages.samplers import SAMPLERS, Quality, preset
from patchforge.service.queue import JobQueue
from tests.patience import PATIENCE
from tests.service.gateway.browser import BROWSER, draw, grey, playground, turns
from tests.service.gateway.harness import CARDS, ScriptedWorker, png

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")


@pytest.fixture
async def page(url: str, worker: ScriptedWorker) -> AsyncIterator[Page]:
    async with playground(url, advanced=True, reduced_motion="reduce") as opened:
        yield opened


async def test_previews_come_first_then_the_picture(page: Page, worker: ScriptedWorker) -> None:
    worker.curtain.clear()
    await page.fill("#prompt", "a red apple")
    await page.fill("#seed", "200")
    await page.press("#prompt", "Enter")
    await expect(page.locator("#place")).to_have_text("Evaluation 1 of 8, 0 % finished")
    await expect(page.locator("#generate")).to_be_disabled()
    await expect(page.locator("#stage")).to_have_attribute("aria-busy", "true")
    assert await grey(page) < 50
    worker.curtain.set()
    await expect(page.locator("#status")).to_have_text("Done")
    await expect(page.locator("#place")).to_have_text("Evaluation 8 of 8, 100 % finished")
    await turns(page, 200)
    await expect(page.locator("[data-part=saved]")).to_have_text("33 %")
    await expect(page.locator("[data-part=done]")).to_have_text("32 of 48")
    await expect(page.locator("[data-part=time]")).to_have_text("0.20 s")
    await expect(page.locator("#generate")).to_be_enabled()


async def test_it_says_when_load_lowered_the_quality(page: Page, worker: ScriptedWorker) -> None:
    await draw(page)
    await expect(page.locator("[data-part=lowered]")).to_be_hidden()
    worker.lowered_by = "load"
    await draw(page)
    await expect(page.locator("[data-part=lowered]")).to_be_visible()


async def test_the_overlays_map_when_and_how_hard(page: Page) -> None:
    await draw(page)
    await turns(page, plain := 200)
    await page.get_by_role("radio", name="Finish map").check(force=True)
    await expect(page.locator("#scale")).to_contain_text("finished early")
    finish = await grey(page)
    await page.get_by_role("radio", name="Difficulty").check(force=True)
    await expect(page.locator("#scale")).to_contain_text("hard")
    difficulty = await grey(page)
    assert len({plain, finish, difficulty}) == 3
    await page.get_by_role("radio", name="Picture").check(force=True)
    await expect(page.locator("#scale")).to_be_hidden()
    assert await grey(page) == plain


async def test_the_scrubber_goes_through_the_previews(page: Page) -> None:
    await draw(page)
    scrubber = page.get_by_role("slider", name="Previews")
    await scrubber.press("Home")
    await expect(page.locator("#place")).to_have_text("Evaluation 1 of 8, 0 % finished")
    await scrubber.press("ArrowRight")
    await expect(page.locator("#place")).to_have_text("Evaluation 2 of 8, 0 % finished")
    await page.get_by_role("button", name="Replay").click()
    await expect(page.locator("#place")).to_have_text("Evaluation 8 of 8, 100 % finished")
    await expect(page.get_by_role("button", name="Replay")).to_have_attribute("aria-pressed", "false")


async def test_arrow_keys_read_the_patches_of_a_picture(page: Page) -> None:
    await draw(page)
    canvas = page.locator("#easel canvas")
    await canvas.focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowDown"):
        await canvas.press(key)
    await expect(page.locator("#patch")).to_have_text(
        "Row 2, column 2 · t = 1 · finished after evaluation 8 · difficulty 0.25"
    )
    await canvas.hover(position={"x": 3, "y": 3})
    await expect(page.locator("#patch")).to_contain_text("Row 1, column 1")


@pytest.mark.parametrize("by", ["button", "escape"])
async def test_a_running_job_can_be_cancelled(page: Page, worker: ScriptedWorker, by: str) -> None:
    worker.curtain.clear()
    await page.select_option("#model", "tiny-class")
    await page.fill("#class", "cat")
    await page.fill("#n", "3")
    await page.click("#generate")
    await expect(page.locator("figure")).to_have_count(3)
    await expect(page.locator("#status")).to_have_text("Drawing…")
    await (page.click("#cancel") if by == "button" else page.keyboard.press("Escape"))
    await expect(page.locator("#status")).to_have_text("Cancelled")
    await expect(page.locator("#shelf")).to_be_hidden()


async def test_two_samplers_side_by_side_on_one_seed(page: Page) -> None:
    await page.check("#compare")
    await page.select_option("#other-sampler", "look_ahead")
    await page.get_by_label("Ratio", exact=True).fill("2")
    await draw(page)
    await expect(page.locator(".pane h2 [data-part=title]")).to_have_text(["Dual loop", "Look ahead"])
    settings = page.locator("[data-part=settings]")
    await expect(settings.nth(0)).to_contain_text("seed 200")
    await expect(settings.nth(1)).to_contain_text("seed 200 · 8 steps · guidance 3 · quantile 0.4 · ratio 2")
    await expect(page.locator("#verdict")).to_have_text(
        "Look ahead did the same work as Dual loop. The pictures are identical."
    )
    await page.fill("#seed", "")
    await page.press("#prompt", "Enter")
    await expect(settings.nth(0)).not_to_contain_text("seed 200 ")
    seeds = [(await settings.nth(pane).inner_text()).split(" · ")[0] for pane in (0, 1)]
    assert seeds[0] == seeds[1]  # the same one, although nobody chose it


async def test_history_outlives_the_page_and_can_be_taken_back(page: Page) -> None:
    await draw(page, "a red apple", 200)
    await page.check("#compare")
    await draw(page, "a green pear", 100)
    await page.reload()
    past = page.locator("#shelf .pick")
    await expect(past).to_have_count(2)
    await page.get_by_role("button", name="a red apple, Dual loop, seed 200").click()
    await expect(page.locator("#prompt")).to_have_value("a red apple")
    await expect(page.locator("#seed")).to_have_value("200")
    await expect(page.locator("#compare")).not_to_be_checked()
    await expect(page.locator("#place")).to_have_text("Evaluation 8 of 8, 100 % finished")
    await page.get_by_role("slider", name="Previews").press("Home")
    await expect(page.locator("#place")).to_have_text("Evaluation 1 of 8, 0 % finished")
    await page.get_by_role("button", name="a green pear, Dual loop and Adaptive").click()
    await expect(page.locator(".pane")).to_have_count(2)
    await page.locator("#shelf li").first.hover()
    await page.get_by_role("button", name="Remove a green pear").click()
    await expect(past).to_have_count(1)
    await page.get_by_role("button", name="Clear").click()
    await expect(page.locator("#shelf")).to_be_hidden()
    await page.reload()
    await expect(page.locator("#form:not([inert])")).to_be_visible()
    await expect(page.locator("#shelf")).to_be_hidden()


async def test_the_oldest_of_history_makes_room(page: Page) -> None:
    await draw(page)
    script = """async () => {
        const { History } = await import("/playground/history.js");
        const history = await History.open();
        const [{ titles, runs }] = await history.all();
        for (let id = 0; id < 60; id += 1) await history.add(titles, runs.map((run) => ({ ...run, id })));
        return (await history.all()).map(({ runs: [{ id }] }) => id);
    }"""
    kept = await page.evaluate(script)
    assert kept == list(range(59, 11, -1))


async def test_every_sampler_and_knob_of_the_server_is_offered(page: Page) -> None:
    offered = await page.locator("#sampler option").evaluate_all("all => all.map(({ value }) => value)")
    assert set(offered) == set(SAMPLERS)
    await page.select_option("#sampler", "dual_loop")
    await page.get_by_label("Quantile", exact=True).fill("0.75")
    await page.get_by_label("Inner steps", exact=True).fill("2")
    await page.get_by_label("Exact").check()
    await expect(page.get_by_label("Quantile, slider")).to_have_value("75")
    await draw(page)
    await expect(page.locator("[data-part=settings]")).to_contain_text("quantile 0.75 · inner steps 2 · exact")


async def test_a_sampler_of_the_future_gets_its_knobs_too(page: Page) -> None:
    script = """async () => {
        const { samplersOf, SamplerPicker } = await import("/playground/knobs.js");
        const properties = {
            name: { const: "warp_drive" },
            tolerance: { type: "number", exclusiveMinimum: 0, maximum: 1, default: 0.005 },
            order: { type: "integer", minimum: 1, maximum: 3, default: 2 },
            mode: { type: "string", enum: ["low", "high"], default: "high" },
            limit: { anyOf: [{ type: "integer", minimum: 1 }, { type: "null" }], default: null },
        };
        const union = { anyOf: [{ oneOf: [{ $ref: "#/components/schemas/WarpDrive" }] }, { type: "null" }] };
        const schemas = { GenerationRequest: { properties: { sampler: union } }, WarpDrive: { properties } };
        const root = document.getElementById("second");
        const picker = new SamplerPicker(root, samplersOf(schemas));
        picker.show({ name: "warp_drive" });
        const before = picker.read();
        root.querySelector('[data-field="sampler.limit"]').value = "5";
        const slider = root.querySelector('[aria-label="Tolerance, slider"]');
        const along = [0, 50, 100].map((place) => {
            slider.value = place;
            slider.dispatchEvent(new Event("input"));
            return picker.read().tolerance;
        });
        return [before, picker.read().limit, along];
    }"""
    before, limit, along = await page.evaluate(script)
    assert before == {"name": "warp_drive", "tolerance": 0.005, "order": 2, "mode": "high"}
    assert limit == 5
    assert 0 < along[0] < 0.005 < along[1] < 0.05  # a small number is not lost at the end of its slider
    assert along[2] == 1


async def test_presets_choose_steps_and_options_of_the_adaptive_sampler(page: Page) -> None:
    card = CARDS[0]
    presets = {quality: preset(quality, card.sampler, card.steps) for quality in Quality}
    for quality, (sampler, steps) in presets.items():
        await page.get_by_role("radio", name=quality.capitalize()).check(force=True)
        await expect(page.locator("#steps")).to_have_value(str(steps))
        await expect(page.locator("#sampler")).to_have_value("adaptive")
        for name in ("tolerance", "order"):
            shown = await page.input_value(f'#first [data-field="sampler.{name}"]')
            assert float(shown) == getattr(sampler, name)
    await page.fill("#steps", "11")
    assert await page.locator("#presets :checked").count() == 0
    await page.fill("#steps", str(presets[Quality.HIGH][1]))
    await expect(page.get_by_role("radio", name="High")).to_be_checked()


async def test_the_dice_roll_a_seed(page: Page) -> None:
    dice = page.get_by_role("button", name="Random seed")
    await dice.click()
    first = await page.input_value("#seed")
    await dice.click()
    assert int(first) < 2**32
    assert await page.input_value("#seed") != first


async def test_pictures_can_be_saved(page: Page) -> None:
    await page.fill("#n", "2")
    await draw(page)
    await page.locator("figure").nth(1).hover()
    async with page.expect_download() as download:
        await page.get_by_role("link", name="Save picture 2").click()
    assert (await download.value).suggested_filename == "a-red-apple-201.png"


async def test_patches_settle_between_previews_and_a_job_begun_again_starts_afresh(url: str, queue: JobQueue) -> None:
    await queue.announce("by hand", CARDS)
    async with playground(url, advanced=True, reduced_motion="reduce") as page:
        await page.fill("#prompt", "a red apple")
        await page.press("#prompt", "Enter")
        claim = await queue.claim("by hand", ["tiny-text"], block_seconds=PATIENCE)
        assert claim is not None
        await queue.publish(claim, Started(attempt=1, steps=8))
        preview = Preview(
            index=0,
            evaluation=3,
            evaluations=8,
            times=[0.5] * 6,
            finished_share=0.0,
            patch_evaluations=12,
            dense_patch_evaluations=18,
            b64_png=b64encode(png(1)).decode(),
        )
        await queue.publish(claim, preview)
        await expect(page.locator("#place")).to_have_text("Evaluation 3 of 8, 0 % finished")
        arrived = {"patches": [0, 1, 2], "times": [0.75] * 3, "finished_share": 0.5}
        await queue.publish(claim, PatchesFinished(index=0, evaluation=4, evaluations=8, **arrived))
        await expect(page.locator("#place")).to_have_text("Evaluation 4 of 8, 50 % finished")
        await page.locator("#easel canvas").hover(position={"x": 3, "y": 3})
        await expect(page.locator("#patch")).to_have_text("Row 1, column 1 · t = 1 · finished after evaluation 4")
        await queue.publish(claim, Started(attempt=2, steps=8))
        await expect(page.locator("#status")).to_have_text("Drawing (attempt 2)…")
        await queue.publish(claim, preview)
        await expect(page.locator("#place")).to_have_text("Evaluation 3 of 8, 0 % finished")
        await page.click("#cancel")
