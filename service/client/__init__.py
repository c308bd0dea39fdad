"""A thin client of the REST API, sync and async: jobs, their events and pictures, and typed errors."""

from patchforge.service.client.asynchronous import AsyncClient
from patchforge.service.client.errors import UnexpectedAnswer, Unreachable
from patchforge.service.client.results import Picture, Result
from patchforge.service.client.sync import Client
from patchforge.service.errors import JobCancelled, JobExpired

__all__ = [
    "AsyncClient",
    "Client",
    "JobCancelled",
    "JobExpired",
    "Picture",
    "Result",
    "UnexpectedAnswer",
    "Unreachable",
]
