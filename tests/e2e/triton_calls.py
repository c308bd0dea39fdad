"""Run in an environment of its own: Triton's clients, which need an older protobuf, against a live server.

python triton_calls.py HTTP_ADDRESS GRPC_ADDRESS
"""

import sys
from typing import Any

import numpy as np
import tritonclient.grpc
import tritonclient.http


def call(module: Any, address: str) -> dict[str, np.ndarray]:
    """Every call of the protocol; the outputs of an inference."""
    client = module.InferenceServerClient(address)
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("emoji-class")
    assert not client.is_model_ready("no-such-model")
    metadata = client.get_server_metadata()
    assert (metadata["name"] if isinstance(metadata, dict) else metadata.name) == "patchforge"
    model = client.get_model_metadata("emoji-class")
    outputs = model["outputs"] if isinstance(model, dict) else model.outputs
    names = [output["name"] if isinstance(output, dict) else output.name for output in outputs]

    given = {
        "class_label": ("BYTES", np.array([b"food-fruit"], dtype=object)),
        "n": ("INT32", np.array([2], dtype=np.int32)),
        "seed": ("INT64", np.array([7], dtype=np.int64)),
        "steps": ("INT32", np.array([4], dtype=np.int32)),
        "guidance": ("FP32", np.array([1.5], dtype=np.float32)),
    }
    inputs = []
    for name, (datatype, value) in given.items():
        inputs.append(module.InferInput(name, [1], datatype))
        inputs[-1].set_data_from_numpy(value)
    everything = client.infer("emoji-class", inputs, request_id="mine")
    some = client.infer("emoji-class", inputs, outputs=[module.InferRequestedOutput("image")])
    assert np.array_equal(some.as_numpy("image"), everything.as_numpy("image"))
    assert some.as_numpy("savings_ratio") is None

    inputs[1].set_data_from_numpy(np.array([11], dtype=np.int32))
    refusal = ""
    try:
        client.infer("emoji-class", inputs)
    except module.InferenceServerException as error:
        refusal = error.message()
    assert refusal.startswith("n: "), refusal
    return {name: everything.as_numpy(name) for name in names}


def main(http: str, grpc: str) -> None:
    """Both clients, which have to agree."""
    over_http, over_grpc = call(tritonclient.http, http), call(tritonclient.grpc, grpc)
    assert over_http.keys() == over_grpc.keys()
    for name, tensor in over_http.items():
        assert np.array_equal(tensor, over_grpc[name]), name
    image = over_http["image"]
    assert image.dtype == np.uint8
    assert image.shape[0] == 2
    assert image.shape[3] == 3
    assert image.std() > 1
    assert list(over_http["seed"]) == [7, 8]
    assert over_http["difficulty"].shape == over_http["finished_at"].shape
    print("savings", over_http["savings_ratio"][0], "image", image.shape)


main(*sys.argv[1:])
