"""One job's trouble stays its own: isolation of what fails, and what its client is told."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import structlog
import torch

from model.errors import ModelError
from service.schemas import JobError

log = structlog.get_logger()
T = TypeVar("T")
R = TypeVar("R")


class NotFinite(ModelError):
    """The network predicted NaN or infinity for this picture."""


def isolating(call: Callable[[list[T]], Iterable[R]], items: list[T]) -> list[R | Exception]:
    """What ``call`` makes of each item, in order. If it fails on all at once, each half is tried by itself.

    So only the culprit fails, and what is merely too much for the device's memory is done in smaller portions.
    """
    try:
        return list(call(items))
    except Exception as error:
        if len(items) == 1:
            return [error]
        log.warning("pictures failed together; trying each half", pictures=len(items), error=repr(error))
    half = len(items) // 2  # out here the failed attempt's memory is free again
    return isolating(call, items[:half]) + isolating(call, items[half:])


def job_error(job_id: str, error: Exception, otherwise: str = "evaluation_failed") -> JobError:
    """What the client is told of an exception; ``otherwise`` is the code of one of no known kind."""
    memory = isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)
    code = "out_of_memory" if memory else "not_finite" if isinstance(error, NotFinite) else otherwise
    log.error("job broke", job=job_id, code=code, exc_info=None if memory else error)
    message = "the device ran out of memory" if memory else "the network could not evaluate this request"
    return JobError(code=code, message=f"{message} ({type(error).__name__})")
