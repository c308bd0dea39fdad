"""`patchforge compare`: how far samples are from a reference, both in files of the ADM evaluation suite's form."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from patchforge.service.cli import options
from patchforge.service.cli.errors import typed_errors
from patchforge.service.cli.report import print_table, write_json

if TYPE_CHECKING:
    from torch import Tensor

    from patchforge.model.evaluation.outside import OutsideJudge

PORTION = 64


def compare(
    samples: Annotated[Path, typer.Argument(help=".npz with arr_0, as `patchforge sample` writes it.")],
    reference: Annotated[Path, typer.Argument(help="The same of real pictures.")],
    out: options.Json = None,
    threads: options.Threads = None,
) -> None:
    """Compare samples with real pictures: Fréchet distance, precision and recall, in EfficientNet-Lite0's features.

    These are not the figures of the ADM suite, which uses another network: compare them only with each other.
    """
    from patchforge.model.device import prepare_cpu
    from patchforge.model.evaluation.frechet import Gaussian, frechet_interval, precision_recall
    from patchforge.model.evaluation.outside import OutsideJudge

    prepare_cpu(threads)
    with typed_errors():
        judge = OutsideJudge()
        made, real = (_features(judge, path) for path in (samples, reference))
        figures = {"frechet distance": frechet_interval(Gaussian.of(real), made), **precision_recall(real, made)}
        rows = [(name, str(figure)) for name, figure in figures.items()]
        print_table(f"{len(made)} samples, {len(real)} real pictures", ("measure", "value"), rows)
        if out is not None:
            counts = {"samples": len(made), "reference": len(real), "features": "efficientnet_lite0"}
            write_json(out, counts | {name: figure.rounded() for name, figure in figures.items()})


def _features(judge: OutsideJudge, path: Path) -> Tensor:
    import torch

    from patchforge.model.errors import DataError
    from patchforge.model.evaluation.npz import read_npz

    found = [judge.look(part).features for part in read_npz(path, PORTION)]
    if sum(map(len, found)) < 2:
        raise DataError(f"{path}: fewer than two pictures")
    return torch.cat(found)
