"""One bundle, loaded and ready: prompts and classes in, pictures out."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.attention import TextContext
from model.autoencoder import Codec
from model.bundle import Bundle, load_weights, network_shapes, open_bundle
from model.denoiser import Condition, Denoiser
from model.device import best_device, upload
from model.errors import ParameterError
from model.generate import Trajectory, run
from model.guidance import Branch
from model.networks import build_network
from model.pft import PFT
from model.samplers import Sampler, make_sampler
from model.text import MiniLM
from model.text_pft import TextPFT

TEXT_BYTES = 64 << 20
"""What prompts that were read may take: asking again, with another seed, is what people do."""


class Pipeline:
    """Network, autoencoder and text encoder of a bundle on one device."""

    def __init__(self, bundle: Bundle, device: torch.device | None = None) -> None:
        """Load everything.

        Raises:
            BundleError: a part is missing, damaged or does not fit.
        """
        self.device = device or best_device()
        self.manifest = manifest = bundle.manifest
        network = build_network(manifest.network)
        network.load_state_dict(load_weights(bundle.weights, network_shapes(manifest.network), dtype=torch.float32))
        self.network = network.to(self.device)
        self.denoiser = Denoiser(self.network)
        self.grid = self.network.grid
        self.codec = Codec(bundle.autoencoder, manifest.latent, self.device)
        self.encoder = None
        if manifest.text_encoder is not None:
            self.encoder = MiniLM(manifest.text_encoder.max_tokens, self.device)
        self._classes = {name: index for index, name in enumerate(manifest.class_names)}
        self._null_text: TextContext | None = None
        self._texts: OrderedDict[str, tuple[TextContext, bool]] = OrderedDict()
        """Of the prompts read last, the latest at the end."""

    @classmethod
    def open(cls, folder: Path, device: torch.device | None = None) -> Pipeline:
        """Load the bundle in ``folder``; BundleError if it is not a whole one."""
        return cls(open_bundle(folder), device)

    def condition(self, prompt: str | None, class_label: str | None) -> tuple[Condition, bool]:
        """What a request asks for, prepared once; and whether its prompt was cut to what the encoder reads.

        Raises:
            ParameterError: the model takes the other of the two, or has no such class.
        """
        if isinstance(self.network, PFT):
            if class_label not in self._classes:
                raise ParameterError("class_label", f"{class_label!r} is not a class of {self.manifest.name}")
            return {Branch.NULL: self.network.null_class, Branch.CONDITIONAL: self._classes[class_label]}, False
        if prompt is None:
            raise ParameterError("prompt", f"{self.manifest.name} is a text-to-image model and needs a prompt")
        context, truncated = self._read(self.network, prompt)
        if self._null_text is None:
            self._null_text, _ = self._refine(self.network, "")
        return {Branch.NULL: self._null_text, Branch.CONDITIONAL: context}, truncated

    def _read(self, network: TextPFT, prompt: str) -> tuple[TextContext, bool]:
        """`_refine`, unless it was asked lately."""
        if prompt not in self._texts:
            self._texts[prompt] = self._refine(network, prompt)
        self._texts.move_to_end(prompt)
        read = self._texts[prompt]
        while len(self._texts) * read[0].bytes > TEXT_BYTES:
            self._texts.popitem(last=False)
        return read

    def forget_texts(self) -> None:
        """Read every prompt anew; only a measurement needs that."""
        self._texts.clear()

    @torch.inference_mode()
    def _refine(self, network: TextPFT, prompt: str) -> tuple[TextContext, bool]:
        if self.encoder is None or self.manifest.text_encoder is None:
            raise ParameterError("prompt", f"{self.manifest.name} has no text encoder")
        encoded = self.encoder.encode([prompt])
        mask = encoded.mask if self.manifest.text_encoder.mask_padding else None
        return network.refine(encoded.states, mask), bool(encoded.truncated[0])

    def prompt_tokens(self, prompt: str | None) -> int:
        """How many tokens of a prompt the model reads."""
        if prompt is None or self.encoder is None:
            return 0
        return min(self.encoder.count(prompt), self.encoder.max_tokens)

    def noise(self, seed: int) -> Tensor:
        """``(P, D)``, drawn on the CPU so that a seed gives the same picture on every device."""
        generator = torch.Generator().manual_seed(seed)
        return upload(self.grid.patchify(torch.randn(self.grid.latent_shape, generator=generator)), self.device)

    def sampler(self, name: str, steps: int, guidance: float, **options: Any) -> Sampler[Any]:
        """A sampler on this model's grid; ParameterError names an option out of range."""
        return make_sampler(name, self.grid, steps, guidance, **options)

    def default_sampler(
        self, name: str | None = None, steps: int | None = None, guidance: float | None = None
    ) -> Sampler[Any]:
        """The bundle's own choice, except for what is given; another sampler comes with its own defaults."""
        defaults = self.manifest.defaults
        options = {} if name else defaults.sampler.model_dump(exclude={"name"})
        return self.sampler(
            name or defaults.sampler.name,
            defaults.steps if steps is None else steps,
            defaults.guidance if guidance is None else guidance,
            **options,
        )

    def condition_on(self, words: str) -> Condition:
        """`condition` on a prompt or a class name, whichever this model takes."""
        by_class = isinstance(self.network, PFT)
        return self.condition(None if by_class else words, words if by_class else None)[0]

    def encode(self, images: Tensor) -> Tensor:
        """Pictures ``(b, height, width, 3)`` uint8 → clean latents ``(b, P, D)``; inverse of `decode`, roughly."""
        return self.grid.patchify(self.codec.encode(images))

    def decode(self, patches: Tensor) -> Tensor:
        """Clean latents ``(b, P, D)`` → ``(b, height, width, 3)`` uint8 on the CPU."""
        return self.codec.decode(self.grid.unpatchify(patches))

    def generate(
        self,
        sampler: Sampler[Any],
        conditions: list[Condition],
        seeds: list[int],
        after_step: Callable[[list[Trajectory]], None] | None = None,
    ) -> tuple[Tensor, list[Trajectory]]:
        """Pictures ``(b, height, width, 3)`` uint8, one a condition and seed, and what each cost."""
        runs = [Trajectory.begin(sampler, c, self.noise(seed)) for c, seed in zip(conditions, seeds, strict=True)]
        run(self.denoiser, runs, after_step)
        return self.decode(torch.stack([each.state.x for each in runs])), runs
