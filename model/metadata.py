"""How a picture was made, written into its file: the picture alone is enough to make it again.

It is written twice: as the text `parameters` that Stable Diffusion web UI (A1111) made common and other tools read, and
as one JSON object that has everything. A PNG holds both as text chunks, `parameters` and `patchforge`. JPEG and WebP
hold them in EXIF: `UserComment`, as that web UI does, and `MakerNote`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

SOFTWARE = f"Patchforge {version('patchforge')}"
PARAMETERS, DETAILS = "parameters", "patchforge"
"""Keywords of the PNG chunks."""
UNICODE = b"UNICODE\0"
"""EXIF's mark of a comment in UTF-16."""


def describe(settings: Mapping[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """The JSON object: `settings` by the names of a request's fields, without those that are None."""
    width, height = size
    given = {name: value for name, value in settings.items() if value is not None}
    return {"software": SOFTWARE, **given, "width": width, "height": height}


def parameters(about: Mapping[str, Any]) -> str:
    """The text `parameters` of a `describe`d picture: the prompts, and a last line of settings."""
    settings = {
        "Steps": about["steps"],
        "Sampler": about["sampler"]["name"],
        "CFG scale": f"{about['guidance']:g}",
        "Seed": about["seed"],
        "Size": f"{about['width']}x{about['height']}",
        "Model hash": about["weights_sha256"][:10],
        "Model": about["model"],
        "Denoising strength": about.get("strength"),
        "Version": SOFTWARE,
    }
    lines = [about.get("prompt") or about["class_label"]]
    if negative := about.get("negative_prompt"):
        lines.append(f"Negative prompt: {negative}")
    return "\n".join([*lines, ", ".join(f"{name}: {value}" for name, value in settings.items() if value is not None)])


def save_options(output_format: str, picture: Image.Image, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments for Pillow's `save` that write `settings` into a file of this format; none if it has no place for them.

    Args:
        output_format: as Pillow names it, in any case.
        picture: what will be saved; its size is written too.
        settings: by the names of a request's fields: `model`, `model_digest`, `weights_sha256`, `prompt` or
            `class_label`, `seed`, `sampler` (its name and options), `steps`, `guidance`, and others that were used.
    """
    about = describe(settings, picture.size)
    texts = {PARAMETERS: parameters(about), DETAILS: json.dumps(about, ensure_ascii=False)}
    match output_format.lower():
        case "png":
            chunks = PngInfo()
            for keyword, text in texts.items():
                chunks.add_text(keyword, text)
            return {"pnginfo": chunks}
        case "jpeg" | "webp":
            return {"exif": _exif(texts)}
        case _:
            return {}


def _exif(texts: Mapping[str, str]) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Software] = SOFTWARE
    exif.get_ifd(ExifTags.IFD.Exif).update(
        {
            ExifTags.Base.UserComment: UNICODE + texts[PARAMETERS].encode("utf-16-be"),
            ExifTags.Base.MakerNote: texts[DETAILS].encode("utf-8"),
        }
    )
    return exif
