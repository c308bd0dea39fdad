"""What the tests share that harm no process: two gateways and a worker whose network can be sabotaged."""

from __future__ import annotations

from dataclasses import dataclass

from tests.faults.gateways import Gateway
from tests.faults.harness import Stack
from tests.faults.processes import Process, eventually

MAX_RUNNING = 5


@dataclass(frozen=True)
class Shared:
    """To be left as it was found: everything running, nothing queued."""

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
        """How many requests ended so, by everyone's metrics: any call of any process may find a job overdue."""
        name = "patchforge_requests_total"
        own = self.other_gateway.metric(name, workers=False, status=status)
        return own + self.gateway.metric(name, status=status)

    def await_ended(self, status: str, count: float) -> None:
        """Until the metrics say so; workers publish theirs every two seconds."""
        eventually(lambda: self.total(status) == count, f"{count} requests to have {status}")
