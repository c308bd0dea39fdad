"""Triton's clients: python triton_python.py HTTP_URL GRPC_ADDRESS."""

import sys
from queue import Queue
from typing import Any

import numpy as np
import tritonclient.grpc
import tritonclient.http
from report import check, packages, refused

ADDRESSES = {tritonclient.http: sys.argv[1].removeprefix("http://"), tritonclient.grpc: sys.argv[2]}
MODEL = "emoji-class"
WISH = {
    "class_label": ("BYTES", np.array([b"food-fruit"], dtype=object)),
    "n": ("INT32", np.array([2], dtype=np.int32)),
    "seed": ("INT64", np.array([7], dtype=np.int64)),
    "steps": ("INT32", np.array([4], dtype=np.int32)),
    "guidance": ("FP32", np.array([1.5], dtype=np.float32)),
}
packages("tritonclient")


def inputs(module: Any, **instead: Any) -> list[Any]:
    made = []
    for name, (datatype, value) in (WISH | instead).items():
        made.append(module.InferInput(name, list(value.shape), datatype))
        made[-1].set_data_from_numpy(value)
    return made


def infer(module: Any, **how: Any) -> Any:
    return module.InferenceServerClient(ADDRESSES[module]).infer(MODEL, inputs(module), **how)


def try_client(module: Any, kind: str) -> None:
    """The same checks with either client."""
    client = module.InferenceServerClient(ADDRESSES[module])
    json = {} if kind == "HTTP" else {"as_json": True}

    @check(f"{kind}: health and metadata")
    def _() -> None:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready(MODEL)
        assert not client.is_model_ready("no-such-model")
        assert client.get_server_metadata(**json)["name"] == "patchforge"
        assert "image" in [each["name"] for each in client.get_model_metadata(MODEL, **json)["outputs"]]

    @check(f"{kind}: infer, all outputs or some, with its own parameters")
    def _() -> None:
        everything = infer(module, request_id="mine", priority=1, timeout=60_000_000, parameters={"who": "me"})
        some = infer(module, outputs=[module.InferRequestedOutput("image")])
        image = everything.as_numpy("image")
        assert np.array_equal(some.as_numpy("image"), image)
        assert some.as_numpy("savings_ratio") is None
        assert image.dtype == np.uint8
        assert (image.shape[0], image.shape[3]) == (2, 3)
        assert image.std() > 1
        assert list(everything.as_numpy("seed")) == [7, 8]

    @check(f"{kind}: compressed requests")
    def _() -> None:
        names = {"request_compression_algorithm": "gzip", "response_compression_algorithm": "gzip"}
        made = infer(module, **(names if kind == "HTTP" else {"compression_algorithm": "gzip"}))
        assert list(made.as_numpy("seed")) == [7, 8]

    @check(f"{kind}: asynchronously")
    def _() -> None:
        if kind == "HTTP":
            made = client.async_infer(MODEL, inputs(module)).get_result()
        else:
            answers: Queue[Any] = Queue()
            client.async_infer(MODEL, inputs(module), callback=lambda result, error: answers.put(result or error))
            made = answers.get(timeout=120)
        assert list(made.as_numpy("seed")) == [7, 8]

    @check(f"{kind}: a refusal names the input")
    def _() -> None:
        wrong = inputs(module, n=("INT32", np.array([11], dtype=np.int32)))
        error = refused(module.InferenceServerException, lambda: client.infer(MODEL, wrong))
        assert error.message().startswith("n: "), error.message()

    @check(f"{kind}: model configuration, statistics and index")
    def _() -> None:
        config = client.get_model_config(MODEL, **json)
        config = config.get("config", config)
        assert {each["name"]: each["data_type"] for each in config["input"]}["class_label"] == "TYPE_STRING"
        [stats] = client.get_inference_statistics(MODEL, **json)["model_stats"]
        assert int(stats["execution_count"]) >= 2
        assert len(client.get_inference_statistics(**json)["model_stats"]) >= 2
        index = client.get_model_repository_index(**json)
        assert MODEL in [each["name"] for each in (index if isinstance(index, list) else index["models"])]


try_client(tritonclient.http, "HTTP")
try_client(tritonclient.grpc, "gRPC")


@check("HTTP and gRPC agree")
def _() -> None:
    over_http, over_grpc = infer(tritonclient.http), infer(tritonclient.grpc)
    for name in ("image", "seed", "savings_ratio", "difficulty", "finished_at"):
        assert np.array_equal(over_http.as_numpy(name), over_grpc.as_numpy(name)), name
