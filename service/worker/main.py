"""The worker process: its models loaded, its signals heard."""

from __future__ import annotations

import asyncio
import signal
from concurrent.futures import ThreadPoolExecutor

from prometheus_client import start_http_server
from pydantic import ValidationError

from model.bundle import explain, list_bundles
from model.device import compile_feed_forwards, prepare_cpu
from model.errors import BundleError
from model.pipeline import Pipeline
from service.errors import InvalidRequest
from service.queue import JobQueue
from service.settings import Settings
from service.threads import in_thread
from service.worker.budgets import patch_budget
from service.worker.cards import model_card
from service.worker.worker import Worker


def load_pipelines(settings: Settings) -> dict[str, Pipeline]:
    """The bundles to serve, loaded, by name.

    Raises:
        BundleError: one is broken.
        InvalidRequest: a model asked for is not there, or there is none at all.
    """
    bundles = {bundle.name: bundle for bundle in list_bundles(settings.bundle_dir)}
    if not bundles:
        raise InvalidRequest(f"there is no model bundle in {settings.bundle_dir}", field="bundle_dir")
    if missing := [name for name in settings.models if name not in bundles]:
        there = ", ".join(bundles)
        raise InvalidRequest(
            f"no bundle named {', '.join(missing)} in {settings.bundle_dir}; there: {there}", field="models"
        )
    chosen = settings.models or list(bundles)
    for name in chosen:
        try:
            model_card(bundles[name].manifest)
        except ValidationError as error:
            raise BundleError(f"{bundles[name].folder}: cannot be served: {explain(error)}") from error
    pipelines = {name: Pipeline(bundles[name]) for name in chosen}
    if settings.compile:
        for pipeline in pipelines.values():
            compile_feed_forwards(pipeline.network)
    return pipelines


def find_budgets(settings: Settings, pipelines: dict[str, Pipeline]) -> dict[str, int]:
    """Patches an evaluation of each model may have: as set, or as a short profile finds."""
    return {name: settings.patch_budget or patch_budget(pipeline) for name, pipeline in pipelines.items()}


async def serve_worker(settings: Settings, redis_url: str, parent: int | None = None) -> None:
    """Run a worker until SIGTERM or SIGINT, or until the process ``parent`` is gone."""
    prepare_cpu(settings.threads)
    loop = asyncio.get_running_loop()
    # One thread for all tensors: the C library keeps a heap for each thread that allocates, and what one has freed is
    # of no use to the others, so that with several a worker's memory creeps up for hours.
    loop.set_default_executor(ThreadPoolExecutor(1, thread_name_prefix="engine"))
    pipelines = await in_thread(load_pipelines, settings)
    budgets = await in_thread(find_budgets, settings, pipelines)
    queue = JobQueue.connect(redis_url, settings)
    worker = Worker(settings, queue, pipelines, budgets, parent)
    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, worker.draining.set)
    server = None
    if settings.worker_metrics_port:
        server, _ = start_http_server(settings.worker_metrics_port, settings.host, worker.registry)
    try:
        await worker.run()
    finally:
        if server is not None:
            server.shutdown()
        await queue.close()
