"""A text encoder's folder in the Hugging Face layout: checked without loading anything of it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from patchforge.model.errors import BundleError
from patchforge.model.storage.files import explain_error, hash_files, mention_pickles, read_json, require_file
from patchforge.model.storage.weights import Shape, printable, read_shapes

EncoderKind = Literal["clip", "gemma", "qwen3_vl", "siglip", "t5"]

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_EXTRAS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_TOKENIZER = 128 << 20
"""Bytes. That of Gemma has 17 MB."""
MAX_SHARDS = 1000
SHARD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,120}\.safetensors")
TOKENS: Mapping[EncoderKind, int] = {"clip": 77, "gemma": 160, "qwen3_vl": 256, "siglip": 64, "t5": 512}
"""Tokens of a padded text, as the paper's code trains with these encoders."""


class Sizes(BaseModel):
    """Sizes of the text network. They bound what is built from them; weights of other sizes are refused anyway."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    vocab_size: int | None = Field(None, ge=1, le=2_000_000)
    hidden_size: int | None = Field(None, ge=1, le=16_384)
    intermediate_size: int | None = Field(None, ge=1, le=131_072)
    num_hidden_layers: int | None = Field(None, ge=0, le=256)
    num_attention_heads: int | None = Field(None, ge=1, le=256)
    num_key_value_heads: int | None = Field(None, ge=1, le=256)
    head_dim: int | None = Field(None, ge=1, le=1024)
    max_position_embeddings: int | None = Field(None, ge=1, le=2**24)
    d_model: int | None = Field(None, ge=1, le=16_384)
    d_ff: int | None = Field(None, ge=1, le=131_072)
    d_kv: int | None = Field(None, ge=1, le=1024)
    num_layers: int | None = Field(None, ge=0, le=256)
    num_heads: int | None = Field(None, ge=1, le=256)
    relative_attention_num_buckets: int | None = Field(None, ge=1, le=4096)
    relative_attention_max_distance: int | None = Field(None, ge=1, le=2**20)


@dataclass(frozen=True)
class EncoderFolder:
    """A checked folder."""

    folder: Path
    kind: EncoderKind
    config: Mapping[str, Any]
    """The part of `config.json` that describes the text network."""
    width: int
    """Of the states, one vector per token."""
    files: tuple[str, ...]
    """All files that are read."""

    @property
    def weights(self) -> list[Path]:
        """The safetensors files."""
        return [self.folder / name for name in self.files if name.endswith(".safetensors")]

    @property
    def sha256(self) -> str:
        """The SHA-256 of all files that are read, in hexadecimal."""
        return hash_files(self.folder, self.files)

    def shapes(self) -> dict[str, tuple[Path, Shape]]:
        """Name, file and shape of every tensor.

        Raises:
            BundleError: a file is damaged, or two have a tensor of the same name.
        """
        found: dict[str, tuple[Path, Shape]] = {}
        for path in self.weights:
            for name, shape in read_shapes(path).items():
                if name in found:
                    raise BundleError(f"{path}: {printable(name)} is also in {found[name][0].name}")
                found[name] = path, shape
        return found


def read_encoder_folder(folder: Path) -> EncoderFolder:
    """Check a text encoder's folder.

    Raises:
        BundleError: a file is missing, damaged or leads out of the folder; the encoder is of no known kind, or would
            need code that comes with it.
    """
    config = _read_object(folder, CONFIG)
    kind, part = _find_text_part(config, folder / CONFIG)
    try:
        sizes = Sizes.model_validate(part)
    except ValidationError as error:
        raise BundleError(f"{folder / CONFIG}: {explain_error(error)}") from error
    width = sizes.d_model if kind == "t5" else sizes.hidden_size
    if width is None:
        raise BundleError(f"{folder / CONFIG}: the width of the text network is missing")
    files = (CONFIG, *_find_tokenizer(folder), *_find_weights(folder))
    return EncoderFolder(folder, kind, part, width, files)


def _find_text_part(config: dict[str, Any], source: Path) -> tuple[EncoderKind, dict[str, Any]]:
    kinds = [kind for kind in get_args(EncoderKind) if config.get("model_type") in (kind, *_names_of_text_part(kind))]
    if not kinds:
        name, known = printable(config.get("model_type")), ", ".join(get_args(EncoderKind))
        raise BundleError(f"{source}: model_type {name} is not a known text encoder; known are {known}")
    part = config.get("text_config", config)
    if not isinstance(part, dict):
        raise BundleError(f"{source}: text_config is not an object")
    return kinds[0], part


def _names_of_text_part(kind: EncoderKind) -> tuple[str, ...]:
    return f"{kind}_text_model", f"{kind}_text"


def _find_tokenizer(folder: Path) -> list[str]:
    if not (folder / TOKENIZER).is_file():
        raise BundleError(
            f"{folder}: no {TOKENIZER}. Make it where the tokenizer works already:"
            " transformers.AutoTokenizer.from_pretrained(…).save_pretrained(…)"
        )
    require_file(folder, TOKENIZER)
    read_json(folder / TOKENIZER, MAX_TOKENIZER)
    extras = [name for name in TOKENIZER_EXTRAS if (folder / name).exists()]
    for name in extras:
        _read_object(folder, name)
    return [TOKENIZER, *extras]


def _find_weights(folder: Path) -> list[str]:
    if (folder / WEIGHTS).is_file():
        require_file(folder, WEIGHTS)
        return [WEIGHTS]
    if not (folder / INDEX).is_file():
        raise BundleError(f"{folder}: no {WEIGHTS}{mention_pickles(folder)}. Use an encoder with safetensors weights")
    names = _read_object(folder, INDEX).get("weight_map")
    shards = sorted({*names.values()}) if isinstance(names, dict) and all(map(_is_shard, names.values())) else []
    if not 0 < len(shards) <= MAX_SHARDS:
        raise BundleError(f"{folder / INDEX}: weight_map must name safetensors files of this folder")
    for name in shards:
        require_file(folder, name)
    return [INDEX, *shards]


def _is_shard(name: object) -> bool:
    return isinstance(name, str) and SHARD.fullmatch(name) is not None


def _read_object(folder: Path, name: str) -> dict[str, Any]:
    """Read a JSON object that asks for no code of its own."""
    path = require_file(folder, name)
    try:
        found = json.loads(read_json(path))
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path}: not JSON: {printable(error)}") from error
    if not isinstance(found, dict):
        raise BundleError(f"{path}: not a JSON object")
    if "auto_map" in found:
        raise BundleError(f"{path}: refused: auto_map asks for code that comes with the model, which is never run")
    if "quantization_config" in found:
        raise BundleError(f"{path}: refused: quantised weights; use the float32, float16 or bfloat16 ones")
    return found
