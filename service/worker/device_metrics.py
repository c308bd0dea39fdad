"""What a worker runs on: versions, device, and the memory it takes there."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from functools import partial
from importlib.metadata import version

import torch
from prometheus_client import CollectorRegistry, Gauge, ProcessCollector
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

# The rest of what ProcessCollector tells, such as start times, means nothing once a gateway has added it up.
_OF_PROCESS = ("cpu_seconds", "open_fds", "resident_memory_bytes")


def register_host(registry: CollectorRegistry, devices: Collection[torch.device]) -> None:
    """Add process and device to a worker's metrics; what a gateway adds up are then totals over its workers."""
    info = Gauge(
        "patchforge_worker_info",
        "1 for each worker with these versions and this device.",
        ("version", "torch", "device"),
        registry=registry,
    )
    for device in devices:
        info.labels(version("patchforge"), torch.__version__, device_name(device)).set(1)
        if device.type == "cuda":
            registry.register(DeviceMemory(partial(cuda_memory, device)))
    registry.register(WorkerProcess())


def device_name(device: torch.device) -> str:
    """``cpu``, or what the driver calls the GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def cuda_memory(device: torch.device) -> tuple[int, int, int]:
    """Bytes tensors take, bytes PyTorch holds for them, and bytes the GPU has."""
    _, total = torch.cuda.mem_get_info(device)
    return torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device), total


class DeviceMemory(Collector):
    """A GPU's memory, read at each scrape."""

    def __init__(self, read: Callable[[], tuple[int, int, int]]) -> None:
        """``read`` gives bytes allocated, reserved and there in all."""
        self._read = read

    def collect(self) -> Iterable[Metric]:
        names = ("allocated", "reserved", "total")
        whats = ("Memory that tensors take on GPUs.", "Memory PyTorch holds on GPUs.", "Memory GPUs have in all.")
        for name, what, value in zip(names, whats, self._read(), strict=True):
            yield GaugeMetricFamily(f"patchforge_worker_gpu_memory_{name}_bytes", what, value)


class WorkerProcess(Collector):
    """Memory, CPU time and open files of this process."""

    def __init__(self) -> None:
        self._process = ProcessCollector(namespace="patchforge_worker", registry=None)

    def collect(self) -> Iterable[Metric]:
        return [metric for metric in self._process.collect() if metric.name.endswith(_OF_PROCESS)]
