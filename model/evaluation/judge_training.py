"""Train the judge. This takes a few minutes on one core."""

from __future__ import annotations

import hashlib
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from patchforge.model.device import best_device, training_autocast
from patchforge.model.evaluation.judge import (
    MAX_TOKENS,
    Judge,
    JudgeNetwork,
    centred,
    on_device,
    sentences,
    shrink,
    to_pixels,
    unseen,
)
from patchforge.model.networks.text_encoder import MiniLM
from patchforge.model.storage.weights import write_weights
from patchforge.model.training.data import Pictures
from patchforge.model.training.progress import progress_bar


@dataclass(frozen=True)
class JudgeRecipe:
    """How to train a judge. The defaults take about six minutes on one core with fast bf16."""

    steps: int = 2800
    batch: int = 64
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    smoothing: float = 0.1
    style_weight: float = 0.2
    text_weight: float = 0.5
    shift: int = 4
    """Random shift of each picture, at most this many pixels in each direction."""
    size: int = 64
    """Pixels on a side of the pictures it looks at; larger ones are made so small."""
    seed: int = 0


def train_judge(pictures: Pictures, out: Path, recipe: JudgeRecipe, licence: str) -> Judge:
    """Train a judge, measure its accuracy, and save it to `out`.

    It trains on all pictures except those of held-out concepts and the `unseen` ones. These measure it.

    Raises:
        DataError: there are fewer than two concepts.
    """
    shown = pictures.where(~pictures.held_out() & ~unseen(pictures))
    styles = tuple(sorted(set(pictures.styles)))
    first = [names[0] for names in shown.captions]
    captions = list(dict.fromkeys(first))
    raw = sentences(MiniLM(MAX_TOKENS), captions)
    mean = raw.mean(dim=0)
    torch.manual_seed(recipe.seed)
    network = JudgeNetwork(len(pictures.class_names), len(styles))
    started = time.monotonic()
    targets = _Targets(
        torch.from_numpy(shown.classes).long(),
        torch.tensor([styles.index(style) for style in shown.styles]),
        torch.tensor([captions.index(name) for name in first]),
    )
    _fit(network, shown, targets, centred(raw, mean), recipe)
    network.half().float().eval()  # weights are stored in half precision, so measure them so
    record: dict[str, Any] = {
        "class_names": pictures.class_names,
        "styles": list(styles),
        "licence": licence,
        "pictures": len(shown),
        "table_sha256": hashlib.sha256(pictures.images.tobytes()).hexdigest(),
        "recipe": asdict(recipe),
        "seconds": round(time.monotonic() - started),
        "created": int(time.time()),
    }
    judge = Judge(network, tuple(pictures.class_names), styles, mean, record)
    record["accuracy"] = {
        "unseen pictures of known concepts": _measure_accuracy(judge, pictures.where(unseen(pictures))),
        "held-out concepts": _measure_accuracy(judge, pictures.where(pictures.held_out())),
    }
    save_judge(judge, out)
    return judge


@dataclass(frozen=True)
class _Targets:
    """Indices of class, style and caption, `(n,)` each."""

    classes: Tensor
    styles: Tensor
    captions: Tensor


def _fit(network: JudgeNetwork, shown: Pictures, targets: _Targets, texts: Tensor, recipe: JudgeRecipe) -> None:
    device = best_device()
    on_device(network).train()
    optimiser = torch.optim.AdamW(network.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    images, weights = torch.from_numpy(shown.images), torch.from_numpy(shown.weights).double()
    texts = texts.to(device)
    with progress_bar() as bar:
        task = bar.add_task("judge", total=recipe.steps, note="")
        for step in range(recipe.steps):
            warm_up = min(1.0, (step + 1) / 100)
            decay = 0.5 + 0.5 * math.cos(math.pi * step / recipe.steps)
            optimiser.param_groups[0]["lr"] = recipe.learning_rate * warm_up * decay
            picked = torch.multinomial(weights, recipe.batch, replacement=True)
            batch = _shift(shrink(to_pixels(images[picked]), recipe.size), recipe.shift).to(device)
            with training_autocast(device):
                features = network(batch).float()
            classes, styles, captions = (
                each[picked].to(device) for each in (targets.classes, targets.styles, targets.captions)
            )
            loss = F.cross_entropy(network.classes(features), classes, label_smoothing=recipe.smoothing)
            loss = loss + recipe.style_weight * F.cross_entropy(network.styles(features), styles)
            loss = loss + recipe.text_weight * F.cross_entropy(network.text_logits(features, texts), captions)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            bar.update(task, advance=1, note=f"loss {loss.item():.3f}")


def _shift(pixels: Tensor, most: int) -> Tensor:
    """Shift each picture by up to `most` pixels and repeat its border. No mirroring, because of arrows and letters."""
    batch, _, height, width = pixels.shape
    padded = F.pad(pixels, (most,) * 4, mode="replicate")
    down, right = torch.randint(0, 2 * most + 1, (2, batch, 1, 1, 1))
    rows, columns = torch.arange(height)[:, None] + down, torch.arange(width) + right
    index = torch.arange(batch)[:, None, None, None], torch.arange(3)[:, None, None], rows, columns
    return padded[index].contiguous(memory_format=torch.channels_last)


def _measure_accuracy(judge: Judge, pictures: Pictures) -> dict[str, float | int]:
    """Share of real pictures for which the judge names the right class and style. Each picture counts the same."""
    if not len(pictures):
        return {"pictures": 0}
    features = judge.features(pictures.images)
    styles = torch.tensor([judge.styles.index(style) for style in pictures.styles])
    right = judge.class_scores(features).argmax(dim=1) == torch.from_numpy(pictures.classes)
    right_style = judge.style_scores(features).argmax(dim=1) == styles
    return {
        "pictures": len(pictures),
        "class": round(float(right.float().mean()), 4),
        "style": round(float(right_style.float().mean()), 4),
    }


def save_judge(judge: Judge, out: Path) -> None:
    """Write `judge.json` and float16 weights to the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    state = {name: each for name, each in judge.network.state_dict().items() if each.ndim}
    state["text_mean"] = judge.text_mean
    shapes = {name: tuple(each.shape) for name, each in state.items()}
    write_weights(out / "model.safetensors", shapes, state.__getitem__, torch.float16)
    (out / "judge.json").write_text(json.dumps(judge.record, indent=1) + "\n")
