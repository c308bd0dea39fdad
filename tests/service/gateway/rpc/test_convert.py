"""Conversions that the tests of whole calls do not cover."""

from patchforge.service.gateway.rpc.convert import (
    event_to_proto,
    generation_from_proto,
    generation_to_proto,
    model_to_proto,
)
from patchforge.service.messages.events import PatchesFinished
from patchforge.service.messages.schemas import GenerationRequest
from patchforge.service.pb.patchforge.v1 import image_service_pb2 as pb
from tests.service.gateway.harness import CARDS, preview


def test_finished_patches_keep_their_order_and_times() -> None:
    event = PatchesFinished(
        index=1, evaluation=7, evaluations=16, patches=[2, 5, 9], times=[0.5, 0.75, 0.25], finished_share=0.125
    )
    message = event_to_proto("1-0", event)
    assert message.WhichOneof("event") == "patches"
    assert list(message.patches.patches) == event.patches
    assert list(message.patches.times) == event.times
    assert (message.patches.evaluation, message.patches.finished_share) == (7, 0.125)


def test_events_say_a_grid_that_is_not_the_models_own() -> None:
    event = PatchesFinished(index=0, evaluation=1, evaluations=2, patches=[1], times=[0.5], finished_share=0.5)
    for grid, told in ((None, (0, 0)), ([2, 4], (2, 4))):
        message = event_to_proto("1-0", event.model_copy(update={"grid": grid})).patches
        assert (message.grid_rows, message.grid_columns) == told
        seen = event_to_proto("1-0", preview(0, 1).model_copy(update={"grid": grid})).preview
        assert (seen.grid_rows, seen.grid_columns) == told


def test_deterministic_is_off_unless_asked_for() -> None:
    assert not generation_from_proto(pb.Generation(prompt="x")).deterministic
    assert generation_from_proto(pb.Generation(prompt="x", deterministic=True)).deterministic
    assert generation_to_proto(GenerationRequest(prompt="x", deterministic=True)).deterministic


def test_metadata_is_on_unless_declined() -> None:
    assert generation_from_proto(pb.Generation(prompt="x")).metadata
    assert not generation_from_proto(pb.Generation(prompt="x", metadata=False)).metadata
    assert generation_to_proto(GenerationRequest(prompt="x", metadata=False)).HasField("metadata")


def test_a_card_keeps_its_digest_examples_and_sizes() -> None:
    card = CARDS[0].model_copy(update={"weights_sha256": "0" * 64, "examples": ["a cat"], "sizes": [(16, 32)]})
    message = model_to_proto(card)
    assert [(size.width, size.height) for size in message.sizes] == [(16, 32)]
    assert (message.weights_sha256, list(message.examples)) == ("0" * 64, ["a cat"])
