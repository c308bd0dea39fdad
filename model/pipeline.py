"""A loaded bundle: prompts or class names in, pictures out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor

from patchforge.class_names import NoSuchClass, match_class
from patchforge.model import parallel
from patchforge.model.budget import fit_all
from patchforge.model.codec import Codec
from patchforge.model.denoiser import Condition, Denoiser
from patchforge.model.device import best_device, serving_autocast, upload
from patchforge.model.errors import ParameterError
from patchforge.model.guidance import Branch
from patchforge.model.networks.attention import TextContext
from patchforge.model.networks.build import build_around
from patchforge.model.networks.pft import PFT
from patchforge.model.networks.text_encoder import EncodedText
from patchforge.model.networks.text_pft import TextPFT
from patchforge.model.recent import Recent
from patchforge.model.results import Picture, Report, Result
from patchforge.model.samplers import Sampler, State, make_sampler
from patchforge.model.samplers.small_first import check_small_until
from patchforge.model.storage.bundle import Bundle, load_network_weights, open_bundle
from patchforge.model.text_encoder import open_encoder
from patchforge.model.trajectory import Trajectory
from patchforge.model.trajectory import run as advance_all
from patchforge.model.types import Grid

TEXT_BYTES = 64 << 20
"""Memory for encoded prompts, and for refined ones, in bytes. Prompts often come again, with another seed."""

SHARPEN = ImageFilter.UnsharpMask(radius=2, percent=100, threshold=0)
"""What an enlarged picture lacks: without it, the finished one stays softer than real ones."""


class Pipeline:
    """The network, autoencoder and text encoder of a bundle, on one device.

    >>> from patchforge import Pipeline
    >>> pipeline = Pipeline.open("emoji-text")
    >>> made = pipeline.generate("red apple, 3d", seed=7)
    >>> made.pictures[0].save("apple.png")
    >>> print(f"saved {made.report.savings_ratio:.0%} of the dense run's patch evaluations")  # doctest: +ELLIPSIS
    saved ...% of the dense run's patch evaluations

    Every error is a `ModelError`: `BundleError` for a bundle that cannot be loaded, `ParameterError` for an argument,
    which its `field` names.

    >>> from patchforge import ModelError
    >>> try:
    ...     pipeline.generate("red apple, 3d", steps=0)
    ... except ModelError as error:
    ...     print(error.field)
    steps
    """

    def __init__(self, bundle: Bundle, device: torch.device | None = None, precision: str | None = None) -> None:
        """Load a bundle. Matrix products are float32 or bfloat16: `precision`, by default `PATCHFORGE_PRECISION`.

        Raises:
            BundleError: a part is missing, damaged or does not fit.
        """
        self.device = device or best_device()
        self.folder = bundle.folder
        self.manifest = manifest = bundle.manifest
        self.weights_sha256, self.digest = bundle.weights_sha256, bundle.digest
        weights = load_network_weights(bundle)
        self.network = build_around(manifest.network.config, weights).to(self.device)
        del weights
        self.denoiser = Denoiser(self.network, precision)
        self.grid = self.network.grid
        self.grids = {size: self._make_grid(*manifest.grid_of(size)) for size in manifest.native_sizes}
        """The grid of each native size (width and height in pixels), the model's own first."""
        self.codec = Codec(bundle.autoencoder, manifest.latent, self.device)
        self.encoder = open_encoder(bundle, self.device, self.denoiser.dtype)
        self._classes = {name: index for index, name in enumerate(manifest.class_names)}
        self._null_text: TextContext | None = None
        self._texts: Recent[str, tuple[TextContext, bool]] = Recent(TEXT_BYTES, lambda read: read[0].bytes)
        """Prompt → refined text, and whether it was cut. Texts of large networks have more bytes than are kept."""
        self._states: Recent[str, EncodedText] = Recent(TEXT_BYTES, lambda encoded: encoded.states.nbytes)
        """Prompt → what the encoder made of it, which has far fewer."""

    @classmethod
    def open(cls, bundle: Path | str, device: torch.device | None = None, precision: str | None = None) -> Pipeline:
        """Load a bundle, given its folder or the name of a shipped bundle.

        Raises:
            BundleError: a file is missing or damaged, or does not fit the others.
        """
        return cls(open_bundle(bundle), device, precision)

    def condition(
        self, prompt: str | None, class_label: str | None, negative_prompt: str | None = None
    ) -> tuple[Condition, bool]:
        """Prepare the condition of a request. Also tell whether the prompt was cut to the encoder's maximum length.

        Guidance leads away from the null branch: its text is `negative_prompt`, by default the empty one.

        Raises:
            ParameterError: the model has no such class, needs a prompt and got none, or takes no negative prompt.
        """
        if isinstance(self.network, PFT):
            if negative_prompt:
                raise ParameterError("negative_prompt", f"{self.manifest.name} is a class model, which has none")
            index = self._classes[self._match_class(class_label)]
            return {Branch.NULL: self.network.null_class, Branch.CONDITIONAL: index}, False
        if prompt is None:
            raise ParameterError("prompt", f"{self.manifest.name} is a text-to-image model and needs a prompt")
        context, truncated = self._encode_cached(self.network, prompt)
        if negative_prompt:
            null, _ = self._encode_cached(self.network, negative_prompt)
            return {Branch.NULL: null, Branch.CONDITIONAL: context}, truncated
        if self._null_text is None:
            self._null_text, _ = self._encode_prompt(self.network, "")
        return {Branch.NULL: self._null_text, Branch.CONDITIONAL: context}, truncated

    def _match_class(self, class_label: str | None) -> str:
        """Return the class that a person means, as the bundle calls it."""
        name = self.manifest.name
        if class_label is None:
            raise ParameterError("class_label", f"{name} is a class model and needs a class")
        try:
            return match_class(class_label, self.manifest.class_names)
        except NoSuchClass as error:
            raise ParameterError("class_label", f"{class_label!r} in {name}: {error}") from error

    def _encode_cached(self, network: TextPFT, prompt: str) -> tuple[TextContext, bool]:
        """Encode a prompt, or return it from memory."""
        return self._texts.get(prompt, lambda: self._encode_prompt(network, prompt))

    def forget_texts(self) -> None:
        """Forget all encoded prompts. Benchmarks use this to time the encoder."""
        self._texts.clear()
        self._states.clear()

    def _encode_prompt(self, network: TextPFT, prompt: str) -> tuple[TextContext, bool]:
        [encoded] = parallel.crew(self.device).run([partial(self._encode_prompt_here, network, prompt)])
        return encoded

    @torch.inference_mode()
    def _encode_prompt_here(self, network: TextPFT, prompt: str) -> tuple[TextContext, bool]:
        encoder = self.encoder
        if encoder is None or self.manifest.text_encoder is None:
            raise ParameterError("prompt", f"{self.manifest.name} has no text encoder")
        encoded = self._states.get(prompt, lambda: encoder.encode([prompt]))
        mask = encoded.mask if self.manifest.text_encoder.mask_padding else None
        with serving_autocast(self.device, self.denoiser.dtype):  # the blocks' weights have that type
            return network.refine(encoded.states, mask), bool(encoded.truncated[0])

    def prompt_tokens(self, prompt: str | None) -> int:
        """Count the tokens of a prompt that the model reads."""
        if prompt is None or self.encoder is None:
            return 0
        return min(self.encoder.count(prompt), self.encoder.max_tokens)

    def is_truncated(self, prompt: str | None) -> bool:
        """Tell whether a prompt has more tokens than the model reads."""
        return prompt is not None and self.encoder is not None and self.encoder.count(prompt) > self.encoder.max_tokens

    def grid_of(self, size: tuple[int, int] | None) -> Grid:
        """Return the grid of a native size (width and height in pixels); None: of the model's own.

        Raises:
            ParameterError: the model was not trained at this size.
        """
        if size is None:
            return self.grid
        if size not in self.grids:
            native = ", ".join(f"{width}x{height}" for width, height in self.grids)
            raise ParameterError("size", f"{self.manifest.name} draws {native}")
        return self.grids[size]

    def noise(self, seed: int, grid: Grid | None = None) -> Tensor:
        """Draw noise `(P, D)`. It is drawn on the CPU, so a seed gives the same noise on every device."""
        generator, grid = torch.Generator().manual_seed(seed), grid or self.grid
        return upload(grid.patchify(torch.randn(grid.latent_shape, generator=generator)), self.device)

    def sampler(
        self, name: str, steps: int, guidance: float, *, grid: Grid | None = None, **options: Any
    ) -> Sampler[Any]:
        """Make a sampler for a grid, by default the model's own.

        `small_until` is passed over where the model was not trained at half the size.

        Raises:
            ParameterError: no such sampler or option, or a value is out of range.
        """
        grid = grid or self.grid
        if name == "adaptive" and "small_until" in options:
            check_small_until(options["small_until"])
            even = grid.rows % 2 == grid.columns % 2 == 0
            if not (even and grid.half in self.grids.values()):
                del options["small_until"]
        return make_sampler(name, grid, steps, guidance, **options)

    def default_sampler(
        self,
        name: str | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        *,
        grid: Grid | None = None,
        **options: Any,
    ) -> Sampler[Any]:
        """Make the bundle's default sampler, with the given values in place of its own.

        A sampler given by `name` has its own default options, not the bundle's.

        Raises:
            ParameterError: no such sampler, an option it does not take, or a value out of range.
        """
        defaults = self.manifest.defaults
        options = ({} if name else defaults.sampler.model_dump(exclude={"name"})) | options
        return self.sampler(
            name or defaults.sampler.name,
            defaults.steps if steps is None else steps,
            defaults.guidance if guidance is None else guidance,
            grid=grid,
            **options,
        )

    def condition_on(self, words: str, negative_prompt: str | None = None) -> Condition:
        """Prepare a condition from a prompt or a class name, whichever this model takes.

        Raises:
            ParameterError: the model has no such class, or takes no negative prompt.
        """
        by_class = isinstance(self.network, PFT)
        return self.condition(None if by_class else words, words if by_class else None, negative_prompt)[0]

    def encode(self, images: Tensor) -> Tensor:
        """Pictures `(b, height, width, 3)` uint8 → clean latents `(b, P, D)`. Approximate inverse of `decode`."""
        latents = self.codec.encode(images)
        return self._make_grid(*(side // self.grid.size for side in latents.shape[-2:])).patchify(latents)

    def decode(self, patches: Tensor, grid: Grid | None = None) -> Tensor:
        """Clean latents `(b, P, D)` of a grid → pictures `(b, height, width, 3)` uint8, on the CPU."""
        return self.codec.decode((grid or self.grid).unpatchify(patches))

    def preview(self, patches: Tensor, grid: Grid | None = None, shown_on: Grid | None = None) -> Tensor:
        """As `decode`, but by the preview decoder if the bundle has one: for a fraction of the cost, and softer.

        The pictures are as large as those of the grid `shown_on`, by default `grid`.
        """
        grid = grid or self.grid
        latents = grid.unpatchify(patches)
        small = self.codec.preview(latents)
        if small is None:
            small = self.codec.decode(latents)
        height, width = (side * self.manifest.autoencoder.downscale for side in (shown_on or grid).latent_shape[1:])
        if small.shape[1:3] == (height, width):
            return small
        large = F.interpolate(small.movedim(-1, 1).float(), (height, width), mode="bilinear", align_corners=False)
        return large.round().byte().movedim(1, -1).contiguous()

    def _make_grid(self, rows: int, columns: int) -> Grid:
        return replace(self.grid, rows=rows, columns=columns)

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        seed: int | Sequence[int] = 0,
        sampler: str | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        negative_prompt: str | None = None,
        size: tuple[int, int] | None = None,
        budget: int | None = None,
        after_step: Callable[[list[Trajectory]], None] | None = None,
        **options: Any,
    ) -> Result:
        """Draw one picture per prompt, all together. For a class-conditional model, prompts are class names.

        The same prompt, seed and settings give the same picture, alone or with others. `seed` is one number for all
        pictures, or one per picture. Guidance leads away from `negative_prompt`, by default the empty one; class models
        have none. Settings that are not given have the bundle's defaults. `options` are those of the sampler.
        `after_step` is called with the trajectories that each step advanced.

        `size` is one of the sizes that the model was trained at, width and height in pixels (`Pipeline.grids`).

        `budget` bounds the patch evaluations of each picture, guidance branches included: the rest of its path takes
        fewer steps, and where nothing is left all patches leap to their latest estimate.

        >>> pipeline = Pipeline.open("emoji-class")
        >>> "cat-face" in pipeline.manifest.class_names
        True
        >>> made = pipeline.generate(["cat-face"] * 4, seed=[1, 2, 3, 4], sampler="dual_loop", steps=4, quantile=0.4)
        >>> [picture.seed for picture in made.pictures]
        [1, 2, 3, 4]
        >>> made.pictures[0].image.size
        (256, 256)

        Raises:
            ParameterError: an argument is out of range, or there is no such class, sampler or size.
        """
        words = [prompts] if isinstance(prompts, str) else list(prompts)
        seeds = [seed] * len(words) if isinstance(seed, int) else list(seed)
        if not words:
            raise ParameterError("prompts", "must not be empty")
        if len(seeds) != len(words):
            raise ParameterError("seed", f"must have one entry per prompt: {len(words)} instead of {len(seeds)}")
        chosen = self.default_sampler(sampler, steps, guidance, grid=self.grid_of(size), **options)
        conditions = {each: self.condition_on(each, negative_prompt) for each in dict.fromkeys(words)}
        settings = self._settings(sampler, steps, guidance, options) | {"budget": budget}
        settings |= {"negative_prompt": negative_prompt or None}
        subject = "prompt" if self.manifest.network.kind == "text" else "class_label"
        made, runs = self.sample(chosen, [conditions[each] for each in words], seeds, after_step, budget)
        pictures = []
        for pixels, word, each, run in zip(made, words, seeds, runs, strict=True):
            report = Report(run.patch_evaluations, run.dense_patch_evaluations)
            about = {subject: word, "seed": each, **settings}
            pictures.append(Picture(Image.fromarray(pixels.numpy()), each, report, about))
        return Result(pictures)

    def _settings(
        self, sampler: str | None, steps: int | None, guidance: float | None, options: dict[str, Any]
    ) -> dict[str, Any]:
        """What `default_sampler` makes of these arguments, for a picture's metadata."""
        defaults = self.manifest.defaults
        named = {"name": sampler} if sampler else defaults.sampler.model_dump()
        return {
            "model": self.manifest.name,
            "model_digest": self.digest,
            "weights_sha256": self.weights_sha256,
            "sampler": named | options,
            "steps": defaults.steps if steps is None else steps,
            "guidance": defaults.guidance if guidance is None else guidance,
        }

    def sample(
        self,
        sampler: Sampler[Any],
        conditions: list[Condition],
        seeds: list[int],
        after_step: Callable[[list[Trajectory]], None] | None = None,
        budget: int | None = None,
    ) -> tuple[Tensor, list[Trajectory]]:
        """Make one picture per condition and seed: `(b, height, width, 3)` uint8, on the CPU.

        Their size is that of the sampler's grid. Also returns the finished runs, which hold each picture's cost.
        `after_step` gets the runs that were just evaluated. `budget` is as in `generate`.

        Raises:
            ParameterError: the budget is not enough for one evaluation.
        """
        grid = sampler.grid
        noises = [self.noise(seed, grid) for seed in seeds]
        runs = [self.begin(sampler, c, noise) for c, noise in zip(conditions, noises, strict=True)]
        change = None if budget is None else partial(fit_all, budget=budget)
        advance_all(self.denoiser, runs, after_step, change)
        return self.decode(torch.stack([each.state.x for each in runs]), grid), runs

    def begin(
        self, sampler: Sampler[Any], condition: Condition, noise: Tensor, state: State | None = None
    ) -> Trajectory:
        """Start a picture from noise `(P, D)`, or from `state`."""
        start = sampler.start(noise) if state is None else state
        return Trajectory(sampler, condition, start, enlarge=partial(self.enlarge, sampler.grid))

    def enlarge(self, grid: Grid, small: Tensor) -> Tensor:
        """Enlarge a picture of half the size: `(P/4, D)` → `(P, D)` of `grid`. Its outlines are sharpened a little."""
        [pixels] = self.decode(small[None], grid.half)
        drawn = Image.fromarray(pixels.numpy())
        large = drawn.resize((2 * drawn.width, 2 * drawn.height), Image.Resampling.BICUBIC).filter(SHARPEN)
        return self.encode(torch.from_numpy(np.array(large))[None])[0]
