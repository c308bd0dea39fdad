"""Between the messages of both protocols: what is worth checking beside the calls that use it."""

from service.events import PatchesFinished
from service.gateway.convert import event_to_proto, generation_from_proto, generation_to_proto
from service.pb.patchforge.v1 import image_service_pb2 as pb
from service.schemas import GenerationRequest


def test_finished_patches_keep_their_order_and_times() -> None:
    event = PatchesFinished(
        index=1, evaluation=7, evaluations=16, patches=[2, 5, 9], times=[0.5, 0.75, 0.25], finished_share=0.125
    )
    message = event_to_proto("1-0", event)
    assert message.WhichOneof("event") == "patches"
    assert list(message.patches.patches) == event.patches
    assert list(message.patches.times) == event.times
    assert (message.patches.evaluation, message.patches.finished_share) == (7, 0.125)


def test_deterministic_is_off_unless_asked_for() -> None:
    assert not generation_from_proto(pb.Generation(prompt="x")).deterministic
    assert generation_from_proto(pb.Generation(prompt="x", deterministic=True)).deterministic
    assert generation_to_proto(GenerationRequest(prompt="x", deterministic=True)).deterministic
