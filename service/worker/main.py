"""The worker process: loads the models, handles signals, runs the worker."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from prometheus_client import start_http_server
from pydantic import ValidationError

from patchforge.model.device import compile_feed_forwards, prepare_cpu
from patchforge.model.errors import BundleError
from patchforge.model.pipeline import Pipeline
from patchforge.model.shipped import SHIPPED
from patchforge.model.storage.bundle import explain_error, find_bundles
from patchforge.service.errors import InvalidRequest
from patchforge.service.queue import connect_all
from patchforge.service.settings import Settings
from patchforge.service.threads import in_thread
from patchforge.service.worker.budgets import patch_budget
from patchforge.service.worker.cards import model_card
from patchforge.service.worker.worker import Worker


def load_pipelines(settings: Settings) -> dict[str, Pipeline]:
    """Load the bundles to serve; returns name → pipeline.

    Raises:
        BundleError: a bundle is broken.
        InvalidRequest: a requested model does not exist, or there are no models at all.
    """
    places = settings.bundle_dir or [SHIPPED]
    bundles, where = find_bundles(places), ", ".join(map(str, places))
    if not bundles:
        raise InvalidRequest(f"there is no model bundle in {where}", field="bundle_dir")
    if missing := [name for name in settings.models if name not in bundles]:
        available = ", ".join(bundles)
        raise InvalidRequest(f"{where} has no bundle {', '.join(missing)}; it has: {available}", field="models")
    chosen = settings.models or list(bundles)
    for name in chosen:
        try:
            model_card(bundles[name].manifest)
        except ValidationError as error:
            raise BundleError(f"{bundles[name].folder}: cannot be served: {explain_error(error)}") from error
    pipelines = {name: Pipeline(bundles[name]) for name in chosen}
    if settings.compile:
        for pipeline in pipelines.values():
            compile_feed_forwards(pipeline.network)
    return pipelines


def find_budgets(settings: Settings, pipelines: dict[str, Pipeline]) -> dict[str, int]:
    """Return the most patches per evaluation of each model: the setting, or the result of a short profile."""
    return {name: settings.patch_budget or patch_budget(pipeline) for name, pipeline in pipelines.items()}


async def serve_worker(
    settings: Settings, parent: int | None = None, started: Callable[[], None] | None = None
) -> None:
    """Run a worker until SIGTERM or SIGINT, or until the process `parent` is gone.

    `started` is called when the models are loaded. After that, no setting and no bundle can stop the worker.

    Raises:
        BundleError: a bundle is broken or unreadable.
        InvalidRequest: a setting is invalid, or names something that does not exist or is in use.
        QueueRefused: the queue server refuses this process.
        ResultsRefused: the object store does.
    """
    prepare_cpu(settings.threads, only_pictures=True)
    loop = asyncio.get_running_loop()
    # One thread for all tensors: the C library has one heap per allocating thread, and memory freed in one heap cannot
    # be used by another thread. With several threads, a worker's memory grows for hours.
    loop.set_default_executor(ThreadPoolExecutor(1, thread_name_prefix="engine"))
    try:
        pipelines = await in_thread(load_pipelines, settings)
    except OSError as error:
        raise BundleError(f"a bundle cannot be read: {error}") from error
    budgets = await in_thread(find_budgets, settings, pipelines)
    queues = connect_all(settings)
    worker = Worker(settings, queues, pipelines, budgets, parent)
    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, worker.draining.set)
    server = None
    if settings.worker_metrics_port:
        try:
            server, _ = start_http_server(settings.worker_metrics_port, settings.host, worker.registry)
        except OSError as error:
            where = f"port {settings.worker_metrics_port} of {settings.host}"
            raise InvalidRequest(f"{where} cannot be used: {error.strerror}", field="worker_metrics_port") from error
    try:
        await asyncio.gather(*(queue.check_not_refused() for queue in queues))
        if started is not None:
            started()
        await worker.run()
    finally:
        if server is not None:
            server.shutdown()
        await asyncio.gather(*(queue.close() for queue in queues))
