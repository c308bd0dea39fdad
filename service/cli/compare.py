"""`patchforge compare`: how far samples are from a reference, both in files of the ADM evaluation suite's form."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from patchforge.service.cli import options
from patchforge.service.cli.errors import typed_errors
from patchforge.service.cli.report import print_table, write_json


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
    from patchforge.model.evaluation.against import compare_features, file_features
    from patchforge.model.evaluation.outside import OutsideJudge

    prepare_cpu(threads)
    with typed_errors():
        judge = OutsideJudge()
        made, real = (file_features(judge, path) for path in (samples, reference))
        figures = {name.replace("_", " "): figure for name, figure in compare_features(real, made).items()}
        rows = [(name, str(figure)) for name, figure in figures.items()]
        print_table(f"{len(made)} samples, {len(real)} real pictures", ("measure", "value"), rows)
        if out is not None:
            counts = {"samples": len(made), "reference": len(real), "features": "efficientnet_lite0"}
            write_json(out, counts | {name: figure.rounded() for name, figure in figures.items()})
