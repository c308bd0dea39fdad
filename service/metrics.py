"""Labels and buckets that the Prometheus metrics of gateways and workers share.

Label values come from fixed lists (served models, samplers, statuses, codes, routes), so callers cannot add series.
"""

from __future__ import annotations

from patchforge.service.messages.schemas import Job

BY_REQUEST = ("model", "sampler")
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.15, 0.25, 0.35, 0.5, 0.75, 1, 1.5, 2.5, 5, 10, 15, 20, 30, 45, 60, 120, 300, 600)
"""Bucket bounds of histograms in seconds: finest where pictures of small and large models take their time."""
OTHER = "other"
"""Label value for anything that is not on a list."""


def request_labels(job: Job) -> tuple[str, str]:
    """Values of the labels `BY_REQUEST`."""
    return job.request.model or OTHER, job.request.sampler.name if job.request.sampler else OTHER
