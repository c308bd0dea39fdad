"""What a worker announces of a bundle."""

from __future__ import annotations

from model.manifest import BundleManifest
from service.schemas import ModelCard


def model_card(manifest: BundleManifest) -> ModelCard:
    """The public face of a bundle; sizes in pixels."""
    width, height = manifest.size
    return ModelCard.model_validate(
        {
            "name": manifest.name,
            "kind": manifest.network.kind,
            "width": width,
            "height": height,
            "grid": manifest.grid,
            "classes": list(manifest.class_names),
            "sampler": manifest.defaults.sampler.model_dump(),
            "steps": manifest.defaults.steps,
            "guidance": manifest.defaults.guidance,
            "licence": manifest.licence,
            "created": manifest.created,
            "description": manifest.description,
        }
    )
