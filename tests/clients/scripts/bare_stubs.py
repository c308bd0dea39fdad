"""gRPC with nothing but generated stubs and a plain channel: python bare_stubs.py HTTP_URL GRPC_ADDRESS.

The stubs are made here, from the .proto files beside the tests, as any user of another language would.
"""

import sys
import tempfile
from importlib.resources import files
from pathlib import Path

import grpc
from grpc_tools import protoc
from report import check, is_png, packages, refused

packages("grpcio", "protobuf")
PROTO = Path(__file__).parents[3] / "proto"
BUILT = tempfile.mkdtemp()
SOURCES = [path.relative_to(PROTO).as_posix() for path in PROTO.rglob("*.proto")]
INCLUDES = [f"-I{PROTO}", f"-I{files('grpc_tools') / '_proto'}"]
assert protoc.main(["protoc", *INCLUDES, f"--python_out={BUILT}", f"--grpc_python_out={BUILT}", *SOURCES]) == 0
sys.path.insert(0, BUILT)

from inference import grpc_inference_service_pb2 as inference  # noqa: E402
from inference.grpc_inference_service_pb2_grpc import GRPCInferenceServiceStub  # noqa: E402
from patchforge.v1 import image_service_pb2 as pb  # noqa: E402
from patchforge.v1.image_service_pb2_grpc import ImageServiceStub  # noqa: E402

channel = grpc.insecure_channel(sys.argv[2])
images = ImageServiceStub(channel)


@check("models")
def _() -> None:
    assert "emoji-text" in [model.name for model in images.ListModels(pb.ListModelsRequest()).models]


@check("generate, with every event and 2 partial images")
def _() -> None:
    wish = pb.Generation(prompt="apple", negative_prompt="red", quality=pb.QUALITY_DRAFT, partial_images=2)
    events = list(images.GenerateImage(pb.GenerateImageRequest(generation=wish)))
    kinds = [each.event.WhichOneof("event") for each in events]
    assert (kinds[0], kinds[-1]) == ("queued", "completed"), kinds
    assert any(is_png(each.event.image.data) for each in events)


@check("generate, a picture in parts")
def _() -> None:
    wish = pb.Generation(prompt="apple", quality=pb.QUALITY_DRAFT)
    asked = pb.GenerateImageRequest(generation=wish, max_chunk_bytes=1024)
    parts = [each.event.image for each in images.GenerateImage(asked) if each.event.HasField("image")]
    assert [part.more for part in parts] == [True] * (len(parts) - 1) + [False]
    assert len(parts) > 1
    assert is_png(b"".join(part.data for part in parts))


@check("submit, watch, fetch")
def _() -> None:
    wish = pb.Generation(model="emoji-class", class_label="food-fruit", width=96, height=64, fit=pb.FIT_COVER)
    job = images.SubmitJob(pb.SubmitJobRequest(generation=wish)).job
    assert [each.event for each in images.WatchJob(pb.WatchJobRequest(job_id=job.id))]
    assert is_png(images.GetImage(pb.GetImageRequest(job_id=job.id)).data)


@check("the Open Inference Protocol")
def _() -> None:
    asked = inference.ModelInferRequest(model_name="emoji-class")
    asked.inputs.add(name="class_label", datatype="BYTES", shape=[1]).contents.bytes_contents.append(b"food-fruit")
    asked.outputs.add(name="seed")
    asked.parameters["seed"].int64_param = 7
    assert len(GRPCInferenceServiceStub(channel).ModelInfer(asked).raw_output_contents) == 1


@check("errors have codes and fields")
def _() -> None:
    wish = pb.Generation(prompt="apple", n=11)
    error = refused(grpc.RpcError, lambda: images.SubmitJob(pb.SubmitJobRequest(generation=wish)))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert dict(error.trailing_metadata())["error-field"] == "n"
