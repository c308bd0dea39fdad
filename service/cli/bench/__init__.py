"""`patchforge bench`: measurements, always against a baseline in the same run."""

from __future__ import annotations

import typer

from patchforge.service.cli.bench.budget import budget
from patchforge.service.cli.bench.claims import claims
from patchforge.service.cli.bench.engine import engine
from patchforge.service.cli.bench.fleet import fleet
from patchforge.service.cli.bench.forward import forward
from patchforge.service.cli.bench.gateway import gateway
from patchforge.service.cli.bench.memory import memory
from patchforge.service.cli.bench.precision import precision
from patchforge.service.cli.bench.queue import queue
from patchforge.service.cli.bench.recipe import recipe
from patchforge.service.cli.bench.sampler import sampler
from patchforge.service.cli.bench.threads import threads
from patchforge.service.cli.errors import needs

bench_app = typer.Typer(help="Measure, always against a baseline in the same run.", no_args_is_help=True)

for command in (sampler, budget, precision, forward, memory, engine, gateway, queue, fleet, claims, recipe, threads):
    extra = {gateway: "server", queue: "all", fleet: "server"}.get(command, "worker")
    bench_app.command(command.__name__)(needs(extra)(command))
