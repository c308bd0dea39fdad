"""What a worker announces about a bundle."""

from __future__ import annotations

from patchforge.model.storage.manifest import BundleManifest
from patchforge.service.messages.schemas import ModelCard


def model_card(manifest: BundleManifest, *, weights_sha256: str | None = None, digest: str | None = None) -> ModelCard:
    """Returns the card of a bundle; sizes are in pixels."""
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
            "usual_patch_evaluations": usual_cost(manifest),
            "description": manifest.description,
            "digest": digest,
            "weights_sha256": weights_sha256,
            "examples": list(manifest.examples),
            "sizes": list(manifest.sizes),
        }
    )


def usual_cost(manifest: BundleManifest) -> int | None:
    """Patch evaluations of a picture of the bundle's own choice, as `patchforge eval --record` measured them."""
    measured = manifest.evaluation.get("patch_evaluations")
    return round(measured) if isinstance(measured, int | float) and measured > 0 else None
