"""Requests to fuzz with, as JSON and as gRPC messages: valid ones, ones with a random field, and random values."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from patchforge.service.pb.patchforge.v1 import image_service_pb2 as pb
from tests.faults.fuzzing import ANYTHING, ODD_NUMBERS, ODD_TEXT
from tests.service.gateway.harness import CARDS

Fields = dict[str, st.SearchStrategy[Any]]
PICTURE = st.just("iVBORw0KGgo=")
TINY = st.floats(5e-324, 0.01, exclude_max=True)
SUBJECT: Fields = {
    "prompt": st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=50),
    "class_label": st.sampled_from(["cat", "grinning face"]),
}
SAMPLER: Fields = {
    "sampler": st.sampled_from(["adaptive", "euler", "heun", {"name": "dual_loop", "quantile": 0.5}, "look_ahead"]),
    "quality": st.sampled_from(["draft", "standard", "high"]),
}
SIZE: Fields = {"width": st.integers(16, 1024), "height": st.integers(16, 2048)}
PICTURES: Fields = {"mask": PICTURE, "strength": st.floats(0.01, 1)}
SOUND: Fields = {
    "model": st.sampled_from([card.name for card in CARDS]),
    "n": st.integers(1, 10),
    "seed": st.integers(0, 2**63 - 11),
    "deterministic": st.booleans(),
    "steps": st.integers(1, 200),
    "guidance": st.floats(0, 30),
    "output_format": st.sampled_from(["png", "webp", "jpeg"]),
    "output_compression": st.integers(0, 100),
    "previews": st.booleans(),
    "priority": st.sampled_from(["high", "normal", "low"]),
    "deadline_seconds": st.floats(1e-3, 86400),
}
OPENAI_FIELDS: Fields = {
    **{name: sound for name, sound in SOUND.items() if name not in ("previews", "output_compression")},
    "size": st.sampled_from(["auto", "48x32", "16x16"]),
    "response_format": st.just("b64_json"),
    "user": st.text(max_size=10),
}
OPTIONS = ("quantile", "inner_steps", "exact", "ratio", "exponent", "tolerance", "skip_tolerance", "refresh")
SAMPLERS = st.fixed_dictionaries(
    {"name": st.sampled_from(["adaptive", "dual_loop", "look_ahead", "multistep"]) | ODD_TEXT},
    optional={name: ODD_NUMBERS | ANYTHING for name in OPTIONS},
)
ODD: Fields = {name: ANYTHING for name in (*SUBJECT, *SAMPLER, *SIZE, *PICTURES, *SOUND, *OPENAI_FIELDS)} | {
    "image": ANYTHING,
    "sampler": SAMPLERS | ANYTHING,
    "strength": TINY | ANYTHING,
    "stream": st.booleans() | ANYTHING,
    "partial_images": st.integers(0, 3) | ANYTHING,
}


def united(*parts: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    """Fields of which gRPC keeps only the last one."""
    return st.tuples(*parts).map(lambda dicts: {name: value for each in dicts for name, value in each.items()})


def one_of(fields: Fields) -> st.SearchStrategy[dict[str, Any]]:
    """Fields that exclude each other."""
    return st.one_of([sound.map(lambda value, name=name: {name: value}) for name, sound in fields.items()])


def some_of(fields: Fields, always: Fields | None = None) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(dict(always or {}), optional=dict(fields))


NONE = st.just(dict[str, Any]())
FROM_PICTURE = some_of(PICTURES, {"image": PICTURE})
NATIVE = united(one_of(SUBJECT), NONE | one_of(SAMPLER), NONE | some_of({}, SIZE), NONE | FROM_PICTURE, some_of(SOUND))
OPENAI = united(one_of(SUBJECT), NONE | one_of(SAMPLER), some_of(OPENAI_FIELDS))
SOME_ODD = united(one_of(ODD) | some_of(ODD), NONE | st.dictionaries(ODD_TEXT, ANYTHING, max_size=3))


def bodies(sound: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    """Valid requests, requests with one or more random fields, or random values."""
    return sound | united(sound, one_of(ODD)) | united(sound, SOME_ODD) | SOME_ODD


INT32 = st.integers(-(2**31), 2**31 - 1)
INT64 = st.integers(-(2**63), 2**63 - 1)
TEXT = st.text(st.characters(codec="utf-8"), max_size=30) | st.just("x" * 3000)
SAMPLER_MESSAGES: Fields = {
    "adaptive": st.builds(
        pb.AdaptiveSampler,
        **{
            name: st.none() | st.floats(0, 1) | st.floats()
            for name in ("exponent", "tolerance", "skip_tolerance", "guidance_from", "guidance_until")
        },
        refresh=st.none() | INT32,
        exact=st.none() | st.booleans(),
    ),
    "euler": st.just(pb.EulerSampler()),
    "heun": st.just(pb.HeunSampler()),
    "dual_loop": st.builds(
        pb.DualLoopSampler, quantile=st.floats(0, 1) | st.floats(), inner_steps=INT32 | st.integers(1, 16)
    ),
    "look_ahead": st.builds(
        pb.LookAheadSampler, quantile=st.floats(0, 1) | st.floats(), ratio=st.floats(1, 4) | st.floats()
    ),
    "multistep": st.builds(pb.MultistepSampler, exponent=st.floats(0.25, 4) | st.floats()),
}
SOUND_MESSAGE = united(
    one_of(SUBJECT),
    NONE | one_of(SAMPLER_MESSAGES) | st.fixed_dictionaries({"quality": st.integers(0, 3)}),
    NONE | some_of({}, SIZE),
    NONE | some_of(PICTURES | {"mask": st.binary(min_size=1)}, {"image": st.binary(min_size=1)}),
    some_of(SOUND | {name: st.integers(0, 3) for name in ("output_format", "priority")}),
)
ODD_FIELDS: Fields = {
    **{name: TEXT for name in ("model", "prompt", "class_label")},
    **{name: INT32 for name in ("n", "steps", "output_compression", "width", "height")},
    **{name: INT32 | st.integers(-1, 5) for name in ("quality", "output_format", "priority")},
    **{name: st.floats() for name in ("guidance", "deadline_seconds")},
    **{name: st.binary(max_size=50) for name in ("image", "mask")},
    "strength": TINY | st.floats(),
    "seed": INT64,
}
MESSAGES = (SOUND_MESSAGE | united(SOUND_MESSAGE, one_of(ODD_FIELDS)) | some_of(ODD_FIELDS | SAMPLER_MESSAGES)).map(
    lambda fields: pb.Generation(**fields)
)
