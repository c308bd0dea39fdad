"""What this version requires of others. If a test here fails, an older process beside a new one would fail too."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest

from patchforge.service.messages.events import Cancelled, Expired, Failed, ImageReady, PatchesFinished, Queued, Started
from patchforge.service.messages.protocol import (
    CAPABILITIES,
    FIRST,
    CardDetails,
    digest_need,
    needs_of,
    split_card,
    whole_card,
)
from patchforge.service.messages.reading import written
from patchforge.service.messages.samplers import SAMPLERS, Adaptive, Sampler
from patchforge.service.messages.schemas import GenerationRequest, ImageReport, JobError, OutputFormat
from tests.service.queue.kit import DONE, REPORT, a_card, a_preview, a_request

REQUEST_FIELDS = {
    *("model", "prompt", "class_label", "n", "seed", "quality", "sampler", "steps", "guidance", "width", "height"),
    *("image", "mask", "strength", "output_format", "output_compression", "previews", "priority"),
    *("deadline_seconds", "deterministic"),
}
"""Capabilities of protocol 0: every worker has them."""
NEEDS = {"budget", "finish_within_seconds", "fit", "model_digest", "negative_prompt", "partial_images", "path"}
"""Newer fields, which are left out unless they are set: workers of protocol 0 end at what they do not know."""
FIELDS: dict[str, set[str]] = {
    "request": REQUEST_FIELDS,
    "card": {
        *("name", "kind", "width", "height", "grid", "classes", "sampler", "steps", "guidance", "licence", "created"),
        "description",
    },
    "queued": {"type"},
    "started": {"type", "attempt", "steps"},
    "preview": {
        *("type", "index", "evaluation", "evaluations", "times", "finished_share", "patch_evaluations"),
        *("dense_patch_evaluations", "b64_png"),
    },
    "patches": {"type", "index", "evaluation", "evaluations", "patches", "times", "finished_share"},
    "image": {"type", "index"},
    "completed": {"type", "report"},
    "failed": {"type", "error"},
    "cancelled": {"type"},
    "expired": {"type"},
    "report": {
        *("patches", "grid_rows", "grid_columns", "patch_evaluations", "dense_patch_evaluations", "savings_ratio"),
        *("queue_seconds", "duration_seconds", "time_to_first_preview_seconds", "prompt_truncated", "prompt_tokens"),
        "images",
    },
    "picture": {"seed", "patch_evaluations", "dense_patch_evaluations", "difficulty", "finished_at"},
    "error": {"code", "message"},
}
"""Fields of protocol 0's messages. Its readers exit at any other, and require all except those of requests."""
OPTIONS: dict[str, set[str]] = {
    "adaptive": {
        *("name", "exponent", "order", "tolerance", "skip_tolerance", "guidance_from", "guidance_until", "refresh"),
        "exact",
    },
    "euler": {"name"},
    "dual_loop": {"name", "quantile", "inner_steps", "exact"},
    "heun": {"name"},
    "look_ahead": {"name", "quantile", "ratio"},
    "multistep": {"name", "exponent"},
}
"""Fields of protocol 0's samplers."""
PICTURE = ImageReport(seed=1, patch_evaluations=1, dense_patch_evaluations=1, difficulty=[0.5], finished_at=[1])
ERROR = JobError(code="unsupported", message="…")
MESSAGES: list[tuple[str, Any]] = [
    ("card", a_card("a")),
    ("queued", Queued()),
    ("started", Started(attempt=1, steps=4)),
    ("preview", a_preview(1)),
    (
        "patches",
        PatchesFinished(index=0, evaluation=1, evaluations=4, patches=[1], times=[0.5], finished_share=0.5),
    ),
    ("image", ImageReady(index=0)),
    ("completed", DONE),
    ("failed", Failed(error=ERROR)),
    ("cancelled", Cancelled()),
    ("expired", Expired()),
    ("report", REPORT),
    ("picture", PICTURE),
    ("error", ERROR),
]


@pytest.mark.parametrize(("kind", "message"), MESSAGES)
def test_readers_of_protocol_0_find_what_they_know_and_nothing_else(kind: str, message: Any) -> None:
    assert set(json.loads(written(message))) == FIELDS[kind]


def test_a_plain_job_has_nothing_that_they_do_not_know() -> None:
    assert set(json.loads(written(a_request()))) <= REQUEST_FIELDS


def test_the_script_finds_the_pictures_that_previews_are_of() -> None:
    """`queue.lua` looks at the beginning of events, in every version."""
    assert written(a_preview(1, index=3)).startswith('{"type":"preview","index":3,')


def test_every_field_of_a_request_is_known_to_every_worker_or_is_a_need() -> None:
    """If you add a field: does a worker that ignores it draw another picture? Then `needs_of` must require it."""
    newer = GenerationRequest.model_fields.keys() - REQUEST_FIELDS
    # A share is settled as a budget before the job is written, and `degrade` is not in its request.
    assert newer == NEEDS | {"metadata", "budget_share", "degrade"}, "decide for each, and write it down here"
    fields = {"budget": 500, "finish_within_seconds": 2.0, "fit": "cover", "negative_prompt": "blurry"}
    for name, value in (fields | {"partial_images": 2}).items():
        request = GenerationRequest.model_validate({"prompt": "a cat", name: value})
        assert needs_of(request) - FIRST == {name}
        assert name in CAPABILITIES
        assert name not in json.loads(GenerationRequest(prompt="a cat").model_dump_json())
    assert needs_of(GenerationRequest(prompt="a cat", negative_prompt="")) <= FIRST, "the same as none"


def test_a_pinned_job_goes_to_workers_that_serve_this_bundle() -> None:
    digest = "0123456789abcdef" * 4
    pinned = a_request(model_digest=digest)
    assert needs_of(pinned) - needs_of(a_request()) == {digest_need(digest)}
    assert digest_need(digest) not in CAPABILITIES
    assert "model_digest" not in json.loads(GenerationRequest(prompt="a cat").model_dump_json())


def test_a_job_without_metadata_goes_to_workers_that_know_of_it() -> None:
    """Others write none, but those of protocol 0 end at a field that they do not know."""
    request = a_request(metadata=False)
    assert needs_of(request) - needs_of(a_request()) == {"metadata"}
    assert json.loads(written(request))["metadata"] is False


def test_what_protocol_0_does_not_know_of_a_card_travels_apart() -> None:
    card = a_card("a").model_copy(
        update={"weights_sha256": "0" * 64, "usual_patch_evaluations": 300, "examples": ["a cat"], "sizes": [(32, 32)]}
        | {"usual_seconds": 0.2, "least_seconds": 0.1, "least_seconds_more": 0.05, "digest": "1" * 64}
    )
    plain, rest = split_card(card)
    assert set(json.loads(written(plain))) == FIELDS["card"]
    assert whole_card(plain, CardDetails.model_validate_json(written(rest))) == card


def test_so_is_every_option_of_a_sampler() -> None:
    union, _ = get_args(Sampler)
    newer = {name: kind.model_fields.keys() - OPTIONS[name] for kind in get_args(union) for name in [kind().name]}
    assert newer.pop("adaptive") == {"small_until"}, "decide for each, and write it down here"
    assert not any(newer.values()), "decide for each, and write it down here"


def test_a_sampler_that_is_small_first_goes_to_workers_that_know_of_it() -> None:
    """Others would end at the option, so it is written only if it is set."""
    plain, small = Adaptive(), Adaptive(small_until=0.5)
    assert needs_of(a_request(sampler=small)) - needs_of(a_request(sampler=plain)) == {"small_until"}
    assert "small_until" in CAPABILITIES - FIRST
    assert set(json.loads(plain.model_dump_json())) == OPTIONS["adaptive"]


def test_that_a_card_is_small_first_travels_apart() -> None:
    card = a_card("a").model_copy(update={"sampler": Adaptive(small_until=0.5)})
    plain, rest = split_card(card)
    assert set(json.loads(written(plain))["sampler"]) == OPTIONS["adaptive"]
    assert whole_card(plain, CardDetails.model_validate_json(written(rest))) == card
    assert whole_card(plain, None).sampler == Adaptive(), "what a worker of protocol 0 says"
    assert "small_until" not in json.loads(written(split_card(a_card("a"))[1]))


def test_todays_jobs_need_nothing_special() -> None:
    everything = GenerationRequest.model_construct(
        width=64, height=64, image="x", mask="x", deterministic=True, output_format=OutputFormat.WEBP
    )
    assert needs_of(everything) == {"format.webp", "size", "image", "mask", "deterministic"}
    for name in SAMPLERS:
        request = GenerationRequest.model_validate({"prompt": "a cat", "sampler": name})
        assert needs_of(request) == {"format.png", f"sampler.{name}"}
        assert needs_of(request) <= FIRST
    assert needs_of(everything) <= FIRST


def test_a_worker_of_this_version_can_do_what_everyone_takes_for_granted() -> None:
    """Removing one of these breaks compatibility: raise PROTOCOL, and update docs/operation.md."""
    assert FIRST <= CAPABILITIES


def test_a_retry_at_a_gateway_of_another_version_is_the_same_request() -> None:
    """This text makes the fingerprint of an Idempotency-Key, so a new field may appear in it only if it is set."""
    request = GenerationRequest(model="emoji", prompt="a cat", n=2)
    assert request.model_dump_json() == (
        '{"model":"emoji","prompt":"a cat","class_label":null,"n":2,"seed":null,"quality":null,"sampler":null,'
        '"steps":null,"guidance":null,"width":null,"height":null,"image":null,"mask":null,"strength":null,'
        '"output_format":"png","output_compression":90,"previews":true,"priority":"normal","deadline_seconds":null,'
        '"deterministic":false}'
    )
