"""``patchforge bench``: measurements, each against its baseline in the same run."""

from __future__ import annotations

import typer

from service.bench.claims_cli import claims
from service.bench.engine_cli import engine
from service.bench.forward_cli import forward
from service.bench.gateway_cli import gateway
from service.bench.recipe_cli import recipe
from service.bench.sampler_cli import sampler

bench_app = typer.Typer(help="Measure, each time against a baseline in the same run.", no_args_is_help=True)

for command in (sampler, forward, engine, gateway, claims, recipe):
    bench_app.command(command.__name__)(command)
