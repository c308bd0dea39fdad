"""The encoder of a bundle's prompts: MiniLM, or the one in a folder, run by the classes of `transformers`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from patchforge.model.device import text_device, upload
from patchforge.model.errors import BundleError
from patchforge.model.networks.text_encoder import EncodedText, MiniLM
from patchforge.model.storage.bundle import Bundle
from patchforge.model.storage.encoder_folder import EncoderFolder, EncoderKind, read_encoder_folder
from patchforge.model.storage.manifest import FolderEncoder
from patchforge.model.storage.weights import check_shapes, load_weights

CLASSES: dict[EncoderKind, tuple[str, str]] = {
    "clip": ("CLIPTextModel", "CLIPTextConfig"),
    "gemma": ("GemmaModel", "GemmaConfig"),
    "qwen3_vl": ("Qwen3VLTextModel", "Qwen3VLTextConfig"),
    "siglip": ("SiglipTextModel", "SiglipTextConfig"),
    "t5": ("T5EncoderModel", "T5Config"),
}
"""Classes of `transformers`: the text network, and its config."""
PREFIXES = ("", "text_model.", "model.", "model.language_model.", "language_model.model.", "language_model.")
"""Where the text network's weights are in the file of a larger model."""
OLD_ROPE = {"rope_theta", "rope_scaling", "partial_rotary_factor"}
"""Fields of older configs, which the library still reads."""


class Encoder(Protocol):
    """Turns prompts into states, one vector per token."""

    max_tokens: int

    def encode(self, prompts: Sequence[str]) -> EncodedText:
        """Encode prompts, padded to `max_tokens`. Longer prompts are cut, and marked as truncated."""
        ...

    def count(self, prompt: str) -> int:
        """Count all tokens of a prompt, also those beyond `max_tokens`."""
        ...


def open_encoder(bundle: Bundle, device: torch.device, dtype: torch.dtype) -> Encoder | None:
    """Load the text encoder of a bundle; None: it has none.

    `device` and `dtype` are those of the image network. `PATCHFORGE_TEXT_DEVICE` may choose another device.

    Raises:
        BundleError: the encoder is missing, damaged or refused, or not the one that the bundle was made with.
    """
    encoder, folder = bundle.manifest.text_encoder, bundle.text_encoder
    if encoder is None:
        return None
    if not isinstance(encoder, FolderEncoder) or folder is None:
        return MiniLM(encoder.max_tokens, device)
    found = read_encoder_folder(folder)
    if found.sha256 != encoder.sha256:
        raise BundleError(f"{folder}: not the text encoder that {bundle.name} was made with: its SHA-256 is another")
    where = text_device(device)
    return LocalEncoder(found, encoder.max_tokens, where, dtype if where == device else torch.float32, device)


class LocalEncoder:
    """A text encoder in a local folder. Nothing is downloaded, and no code in the folder is run."""

    def __init__(
        self,
        source: EncoderFolder,
        max_tokens: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        out: torch.device | None = None,
    ) -> None:
        """Load the tokenizer and the weights. `out` is where the states go, by default `device`.

        Raises:
            BundleError: a file is damaged, weights do not fit the config, or the installed `transformers` cannot read
                the encoder.
        """
        self.source = source
        self.max_tokens = max_tokens
        self.device = device
        self.out = out or device
        self.tokenizer = _load_tokenizer(source)
        self.network = _load_network(source, dtype).to(device)
        if max(self.tokenizer.get_vocab().values(), default=0) >= self.network.config.vocab_size:
            raise BundleError(f"{source.folder}: the tokenizer has tokens that the network has no vectors for")
        if max_tokens > (most := getattr(self.network.config, "max_position_embeddings", max_tokens)):
            raise BundleError(f"{source.folder}: reads at most {most} tokens; text_encoder.max_tokens is {max_tokens}")
        self.encode([""])  # an encoder that cannot read even the empty text is found out now

    @torch.inference_mode()
    def encode(self, prompts: Sequence[str]) -> EncodedText:
        """Encode prompts, padded to `max_tokens`. Longer prompts are cut, and marked as truncated.

        The states of padding are those that the encoder gives, because the paper's networks attend to them.
        """
        tokens = self._tokenise(prompts)
        mask = tokens["attention_mask"].bool()
        states = self.network(**{name: upload(each, self.device) for name, each in tokens.items()}).last_hidden_state
        if not torch.isfinite(states).all():
            raise BundleError(f"{self.source.folder}: the text encoder's states are not finite")
        truncated = torch.tensor([self.count(prompt) > self.max_tokens for prompt in prompts])
        return EncodedText(states.float().to(self.out), mask.to(self.out), truncated)

    def count(self, prompt: str) -> int:
        """Count all tokens of a prompt, also those beyond `max_tokens`."""
        return len(self.tokenizer(prompt, verbose=False)["input_ids"])

    def _tokenise(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        try:
            read = self.tokenizer(
                list(prompts), padding="max_length", truncation=True, max_length=self.max_tokens, return_tensors="pt"
            )
        except Exception as error:
            raise BundleError(f"{self.source.folder}: the tokenizer cannot pad a text: {error!r:.300}") from error
        return {name: read[name] for name in ("input_ids", "attention_mask")}


def _load_tokenizer(source: EncoderFolder) -> Any:
    import transformers

    transformers.utils.logging.set_verbosity_error()
    try:
        # This class reads tokenizer.json as it is, whatever class the config names.
        return transformers.PreTrainedTokenizerFast.from_pretrained(source.folder, local_files_only=True)
    except Exception as error:  # of the library's own Rust code, too
        raise BundleError(f"{source.folder}: the tokenizer cannot be read: {error!r:.300}") from error


def _load_network(source: EncoderFolder, dtype: torch.dtype) -> Any:
    """Load the text network. The library gets a config of known fields and tensors that were checked, and no file."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    names = CLASSES[source.kind]
    if missing := [name for name in names if not hasattr(transformers, name)]:
        version = transformers.__version__
        raise BundleError(f"{source.folder}: transformers {version} has no {missing[0]}; install a later one")
    network_class, config_class = (getattr(transformers, name) for name in names)
    try:
        known = {*config_class.__annotations__, *OLD_ROPE}
        config = config_class(**{name: value for name, value in source.config.items() if name in known})
        with torch.device("meta"):
            expected = {name: tuple(each.shape) for name, each in network_class(config).state_dict().items()}
    except Exception as error:  # the library may refuse a config that passed our checks
        raise BundleError(f"{source.folder}: the encoder cannot be built: {error!r:.300}") from error
    for tied in getattr(network_class, "_tied_weights_keys", None) or ():
        expected.pop(tied, None)
    weights = _read_weights(source, expected, dtype)
    network = network_class.from_pretrained(
        None, config=config, state_dict=weights, dtype=dtype, local_files_only=True, use_safetensors=True
    )
    return network.eval()


def _read_weights(source: EncoderFolder, expected: dict[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, Tensor]:
    """Read the expected tensors, under their names in the text network. The folder may hold others, of other parts."""
    held = source.shapes()
    prefix = _find_prefix(held, expected)
    wanted = {prefix + name: name for name in expected}
    found = {wanted[name]: shape for name, (_, shape) in held.items() if name in wanted}
    check_shapes(str(source.folder), found, expected)
    weights: dict[str, Tensor] = {}
    for path in source.weights:
        weights |= {wanted[name]: each for name, each in load_weights(path, dtype=dtype, names=wanted).items()}
    return weights


def _find_prefix(held: Iterable[str], expected: Iterable[str]) -> str:
    names = {*held}
    found = {prefix: sum(prefix + name in names for name in expected) for prefix in PREFIXES}
    return max(PREFIXES, key=lambda prefix: found[prefix])
