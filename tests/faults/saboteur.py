"""Runs the command line with a network that fails on request: the seed selects the failure."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from dataclasses import replace

import torch

from patchforge.model.denoiser import Denoiser, Evaluation, Memory
from patchforge.model.types import Prediction
from patchforge.service.cli.main import app
from patchforge.service.messages.schemas import Job
from patchforge.service.messages.source import Source
from patchforge.service.worker.engine import Engine
from patchforge.service.worker.live import LiveJob
from tests.faults.held_device import held

KILLS, GREEDY, TOO_GREEDY, RAISES, TURNS_NAN, UNCERTAIN = range(666_001, 666_007)
ROOM = 3  # greedy pictures that fit into the device's memory at a time

_admit, _evaluate = Engine.admit, Denoiser.evaluate
_owners: list[tuple[Memory, int]] = []  # the seed of each picture's request


def admit(engine: Engine, job: Job, source: Source | None = None) -> LiveJob:
    live = _admit(engine, job, source)
    _owners.extend((picture.trajectory.memory, job.request.seed or 0) for picture in live.pictures)
    return live


def evaluate(denoiser: Denoiser, evaluations: Sequence[Evaluation]) -> list[Prediction]:
    # A worker also profiles its device, without any request.
    seeds = [next((seed for memory, seed in _owners if memory is each.memory), 0) for each in evaluations]
    if KILLS in seeds:
        os.kill(os.getpid(), signal.SIGKILL)
    if seeds.count(GREEDY) > ROOM:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7.00 GiB")  # like a GPU
    if TOO_GREEDY in seeds:
        torch.empty(1 << 50)  # more than any CPU has
    if RAISES in seeds:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    predictions = _evaluate(denoiser, evaluations)
    return [spoilt(each, seed) for each, seed in zip(predictions, seeds, strict=True)]


def spoilt(prediction: Prediction, seed: int) -> Prediction:
    if seed == TURNS_NAN:
        return replace(prediction, velocity=torch.full_like(prediction.velocity, torch.nan))
    if seed == UNCERTAIN:
        return replace(prediction, log_variance=torch.full_like(prediction.log_variance, torch.nan))
    return prediction


if __name__ == "__main__":
    Engine.admit, Denoiser.evaluate = admit, evaluate  # type: ignore[method-assign]
    Engine.step = held(Engine.step)  # type: ignore[method-assign]
    app()
