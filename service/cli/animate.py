"""`patchforge animate`: shows how a picture settles, patch by patch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from patchforge.service.cli import options
from patchforge.service.cli.errors import typed_errors
from patchforge.service.errors import InvalidRequest

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from patchforge.model.pipeline import Pipeline
    from patchforge.model.trajectory import Trajectory
    from patchforge.model.types import Grid

SIDE = 256
"""Pixels on a side of one picture in the animation; smaller pictures are enlarged."""
MARGIN, CAPTION = 8, 30
UNFINISHED = 0.45
"""How far unfinished patches are faded to grey."""
GREY = (150, 150, 158)


def animate(
    prompts: Annotated[list[str], typer.Argument(help="Prompts or class names; one picture each, side by side.")],
    out: Annotated[Path, typer.Option(help="File to write: .webp, .gif or .png.")] = Path("settling.webp"),
    bundle: Annotated[Path, typer.Option(help="Folder of a bundle, or name of a shipped bundle.")] = Path("emoji-text"),
    sampler: options.Sampler = None,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    seed: options.Seed = 0,
    frame_seconds: Annotated[float, typer.Option(min=0.02, max=10, help="Seconds that each step is shown.")] = 0.5,
    columns: Annotated[int, typer.Option(min=1, help="Pictures in a row.")] = 4,
    threads: options.Threads = None,
) -> None:
    """Draw pictures and show in an animation which patches finish when; unfinished ones are faded."""
    from patchforge.model.device import prepare_cpu
    from patchforge.model.pipeline import Pipeline

    prepare_cpu(threads)
    with typed_errors():
        if out.suffix.lower() not in (".webp", ".gif", ".png"):
            raise InvalidRequest(f"{out}: requires a name that ends in .webp, .gif or .png", field="out")
        pipeline = Pipeline.open(bundle)
        panels = _Panels(pipeline, prompts, columns)

        def show(live: list[Trajectory]) -> None:
            panels.add_frame(live)

        made = pipeline.generate(prompts, seed=seed, sampler=sampler, steps=steps, guidance=guidance, after_step=show)
        saved = [picture.report.savings_ratio for picture in made.pictures]
        panels.add_end(saved)
        first, *rest = panels.frames
        shown = [round(1000 * frame_seconds)] * len(rest) + [3000]
        out.parent.mkdir(parents=True, exist_ok=True)
        first.save(out, save_all=True, append_images=rest, duration=shown, loop=0, quality=85)
    print(f"{out}: {len(panels.frames)} frames; {sum(saved) / len(saved):.0%} of the evaluations saved")


class _Panels:
    """The frames, each with one panel per prompt: the picture as it stands, and a line below."""

    def __init__(self, pipeline: Pipeline, prompts: list[str], columns: int) -> None:
        self.pipeline, self.prompts, self.columns = pipeline, prompts, min(columns, len(prompts))
        self.frames: list[Image] = []
        self._runs: list[Trajectory] = []

    def add_frame(self, live: list[Trajectory]) -> None:
        """Add a frame after a step that advanced the runs in `live`; the first call has all runs, in order."""
        import torch

        from patchforge.model.samplers.small_first import is_small

        self._runs = self._runs or live
        states = [run.state for run in self._runs]
        pixels = torch.stack([self._decode(*run.seen) for run in self._runs])
        finished = torch.stack([(state.times >= 1).float().cpu() for state in states])
        captions = [
            f"step {run.state.evaluations} of {run.evaluations} · "
            + ("half the size" if is_small(run.state) else f"{share:.0%} finished")
            for run, share in zip(self._runs, finished.mean(1), strict=True)
        ]
        self.frames.append(self._compose(self._fade(pixels, finished), captions))

    def _decode(self, patches: torch.Tensor, grid: Grid) -> torch.Tensor:
        """A picture `(height, width, 3)` uint8 of the model's own size, however small it is still drawn."""
        import torch.nn.functional as F

        small = self.pipeline.decode(patches[None], grid).movedim(-1, 1)
        width, height = self.pipeline.manifest.size
        return F.interpolate(small, (height, width), mode="nearest")[0].movedim(0, -1)

    def add_end(self, saved: list[float]) -> None:
        """Add the finished pictures, with what each of them saved."""
        import torch

        pixels = self.pipeline.decode(torch.stack([run.state.x for run in self._runs]))
        self.frames.append(self._compose(pixels, [f"{share:.0%} of the work saved" for share in saved]))

    def _fade(self, pixels: torch.Tensor, finished: torch.Tensor) -> torch.Tensor:
        """Fade unfinished patches of pictures `(n, height, width, 3)` to grey; `finished` is `(n, P)`, 0 or 1."""
        import torch
        import torch.nn.functional as F

        grid = self.pipeline.grid
        mask = finished.unflatten(1, (grid.rows, grid.columns))[:, None]
        shown = F.interpolate(mask, pixels.shape[1:3], mode="nearest")[:, 0, ..., None]
        weight = UNFINISHED * (1 - shown)
        return torch.lerp(pixels.float(), torch.tensor(GREY, dtype=torch.float32).expand_as(pixels), weight).byte()

    def _compose(self, pixels: torch.Tensor, captions: list[str]) -> Image:
        """One frame of all panels."""
        from PIL import Image, ImageDraw, ImageFont

        rows = -(-len(self.prompts) // self.columns)
        width, height = SIDE + 2 * MARGIN, SIDE + 2 * MARGIN + CAPTION
        frame = Image.new("RGB", (self.columns * width, rows * height), "white")
        draw, font = ImageDraw.Draw(frame), ImageFont.load_default(12)
        for number, (picture, prompt, caption) in enumerate(zip(pixels, self.prompts, captions, strict=True)):
            left, top = number % self.columns * width + MARGIN, number // self.columns * height + MARGIN
            image = Image.fromarray(picture.numpy())
            scale = Image.Resampling.NEAREST if image.width < SIDE else Image.Resampling.LANCZOS
            frame.paste(image.resize((SIDE, SIDE), scale) if image.width != SIDE else image, (left, top))
            draw.text((left, top + SIDE + 2), prompt, "black", font)
            draw.text((left, top + SIDE + 16), caption, (90, 90, 100), font)
        return frame
