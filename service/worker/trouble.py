"""Contains failures: one job's error must not affect other jobs. Also decides what the client is told."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import structlog
import torch

from patchforge.model.errors import ModelError
from patchforge.service.messages.schemas import JobError

log = structlog.get_logger()
T = TypeVar("T")
R = TypeVar("R")


class NotFinite(ModelError):
    """The network predicted NaN or infinity for this picture."""


def isolate_failures(call: Callable[[list[T]], Iterable[R]], items: list[T]) -> list[R | Exception]:
    """Returns what `call` makes of each item, in order. If it fails for all together, each half is tried alone.

    So only the item at fault fails, and a batch too large for the device's memory is computed in smaller parts.
    """
    try:
        return list(call(items))
    except Exception as error:
        if len(items) == 1:
            return [error]
        log.warning("pictures failed together; trying each half", pictures=len(items), error=repr(error))
    half = len(items) // 2  # outside `except`, the memory of the failed attempt is free again
    return isolate_failures(call, items[:half]) + isolate_failures(call, items[half:])


def job_error(job_id: str, error: Exception, otherwise: str = "evaluation_failed") -> JobError:
    """Returns what to tell the client about an exception. `otherwise` is the code for unknown exceptions."""
    memory = isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)
    code = "out_of_memory" if memory else "not_finite" if isinstance(error, NotFinite) else otherwise
    log.error("job broke", job=job_id, code=code, exc_info=None if memory else error)
    message = "the device ran out of memory" if memory else "the network could not evaluate this request"
    return JobError(code=code, message=f"{message} ({type(error).__name__})")
