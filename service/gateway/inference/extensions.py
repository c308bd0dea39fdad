"""Triton's extensions of the protocol, as far as they mean something here: the same over REST and gRPC."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from patchforge.service.gateway.inference.protocol import (
    MODEL_VERSION,
    SERVER,
    TensorInfo,
    describe_inputs,
    describe_outputs,
)
from patchforge.service.gateway.inference.tensors import BYTES
from patchforge.service.gateway.jobs import JobService
from patchforge.service.gateway.statistics import Duration
from patchforge.service.messages.schemas import ModelCard

NEEDED = {"text": "prompt", "class": "class_label"}
"""The one input that a model of each kind needs."""


def configuration(card: ModelCard) -> dict[str, Any]:
    """A model's inputs and outputs. A batch of 0 means that callers add no dimension of their own."""
    return {
        "name": card.name,
        "platform": SERVER,
        "backend": SERVER,
        "max_batch_size": 0,
        "input": [_tensor(info) | {"optional": info.name != NEEDED[card.kind]} for info in describe_inputs(card)],
        "output": [_tensor(info) for info in describe_outputs(card)],
    }


def statistics(service: JobService, card: ModelCard) -> dict[str, Any]:
    """What came of a model's inference calls since this gateway started. Each call is one execution."""
    counts = service.statistics.of(card.name)
    return {
        "name": card.name,
        "version": MODEL_VERSION,
        "last_inference": counts.last_ms,
        "inference_count": counts.pictures,
        "execution_count": counts.success.count,
        "inference_stats": {
            "success": asdict(counts.success),
            "fail": asdict(counts.fail),
            "queue": asdict(counts.queue),
            "compute_input": asdict(Duration()),
            "compute_infer": asdict(counts.infer),
            "compute_output": asdict(Duration()),
        },
    }


def index_entry(card: ModelCard) -> dict[str, str]:
    """A model in the repository's index."""
    return {"name": card.name, "version": MODEL_VERSION, "state": "READY", "reason": ""}


def _tensor(info: TensorInfo) -> dict[str, Any]:
    kind = "STRING" if info.datatype == BYTES else info.datatype
    return {"name": info.name, "data_type": f"TYPE_{kind}", "dims": list(info.shape)}
