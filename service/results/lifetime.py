"""The rule by which the bucket deletes what nobody deleted: pictures of ended jobs, and what a dead process left."""

from __future__ import annotations

import math
from typing import Any

from patchforge.service.errors import InvalidRequest
from patchforge.service.results.store import SCHEME
from patchforge.service.settings import Settings

DAY = 86400  # seconds
USUAL_WINDOW = 24  # hours: the default of `completion_window`


def expiry_rule(settings: Settings, window: int = USUAL_WINDOW) -> dict[str, Any]:
    """Returns an S3 lifecycle configuration, as JSON has it. `window`: hours of the longest `completion_window`.

    The store counts whole days from an object's creation. A batch's first picture may be as old as its window when the
    batch ends, and must still last as long as its results.

    Raises:
        InvalidRequest: pictures are not in an object store.
    """
    if not settings.results.startswith(SCHEME):
        raise InvalidRequest("is not s3://bucket/prefix, so nothing is in a bucket", field="PATCHFORGE_RESULTS")
    seconds = 3600 * window + settings.batch_ttl_seconds + settings.result_ttl_seconds
    _, _, prefix = settings.results.removeprefix(SCHEME).partition("/")
    rule = {
        "ID": "-".join(["patchforge", *prefix.split("/")]).rstrip("-")[:255],
        "Status": "Enabled",
        "Filter": {"Prefix": f"{prefix}/" if prefix else ""},
        "Expiration": {"Days": math.ceil(seconds / DAY)},
    }
    return {"Rules": [rule]}
