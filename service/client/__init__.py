"""A thin client of the REST API: jobs, their events and their pictures, sync and async, with typed errors."""

from service.client.asynchronous import AsyncClient
from service.client.errors import UnexpectedAnswer, Unreachable
from service.client.results import Picture, Result
from service.client.sync import Client
from service.errors import JobCancelled, JobExpired

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
