"""Metrics of what a worker runs on: versions, device, and the memory it uses there."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from functools import partial
from importlib.metadata import version

import torch
from prometheus_client import CollectorRegistry, Gauge, ProcessCollector
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

# A gateway adds the workers' values up. The other values of ProcessCollector, such as start times, cannot be added.
_ADDABLE = ("cpu_seconds", "open_fds", "resident_memory_bytes")


def register_host(registry: CollectorRegistry, devices: Collection[torch.device]) -> None:
    """Adds process and devices to a worker's metrics. All values can be added up over workers."""
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
    """Returns `cpu`, or the driver's name for the GPU."""
    named = {"cuda": torch.cuda, "xpu": torch.xpu}.get(device.type)
    return named.get_device_name(device) if named else device.type


def cuda_memory(device: torch.device) -> tuple[int, int, int]:
    """Returns the bytes that tensors use, the bytes that PyTorch has reserved, and the bytes of the whole GPU."""
    _, total = torch.cuda.mem_get_info(device)
    return torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device), total


class DeviceMemory(Collector):
    """A GPU's memory, read at each scrape."""

    def __init__(self, read: Callable[[], tuple[int, int, int]]) -> None:
        """`read` returns bytes allocated, reserved and in total."""
        self._read = read

    def collect(self) -> Iterable[Metric]:
        names = ("allocated", "reserved", "total")
        whats = ("Memory that tensors use on GPUs.", "Memory that PyTorch has reserved on GPUs.", "Memory of the GPUs.")
        for name, what, value in zip(names, whats, self._read(), strict=True):
            yield GaugeMetricFamily(f"patchforge_worker_gpu_memory_{name}_bytes", what, value)


class WorkerProcess(Collector):
    """Memory, CPU time and open files of this process."""

    def __init__(self) -> None:
        self._process = ProcessCollector(namespace="patchforge_worker", registry=None)

    def collect(self) -> Iterable[Metric]:
        return [metric for metric in self._process.collect() if metric.name.endswith(_ADDABLE)]
