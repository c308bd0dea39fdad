"""Processes shared by tests that harm none of them: two gateways, and a worker whose network can be sabotaged."""

from __future__ import annotations

from dataclasses import dataclass

from tests.faults.gateways import SHORT, Gateway
from tests.faults.harness import Stack
from tests.processes import Process, eventually

MAX_RUNNING = 5


@dataclass(frozen=True)
class Shared:
    """Tests must leave it as they found it: all processes running, nothing queued."""

    stack: Stack
    gateway: Gateway
    other_gateway: Gateway
    worker: Process

    @classmethod
    def start(cls, stack: Stack) -> Shared:
        worker = stack.launch_worker("saboteur", max_running=MAX_RUNNING)
        gateways = stack.start_gateway(), stack.start_gateway()
        worker.wait_for("worker ready")
        for gateway in gateways:
            gateway.await_ready()
        return cls(stack, *gateways, worker)

    def total(self, status: str) -> float:
        """Counts the requests that ended with this status, over all processes, because any of them may expire a job."""
        name = "patchforge_requests_total"
        own = self.other_gateway.metric(name, workers=False, status=status)
        return own + self.gateway.metric(name, status=status)

    def catch_up(self) -> None:
        """Waits until the metrics have all requests that have ended: a worker publishes all its metrics together."""
        name, labels = "patchforge_requests_total", {"sampler": "heun", "status": "completed"}
        before = self.gateway.metric(name, **labels)
        self.gateway.ended(self.gateway.submit(SHORT | {"sampler": "heun"}))
        eventually(lambda: self.gateway.metric(name, **labels) > before)

    def await_ended(self, status: str, count: float) -> None:
        """Waits until the metrics say so. Workers publish theirs every two seconds."""
        eventually(lambda: self.total(status) == count, f"{count} requests to have {status}")
