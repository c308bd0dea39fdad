"""Results outside the queue server: pictures in an S3-compatible object store; docs/operation.md says how to set it up."""

from patchforge.service.results.store import ObjectStore, Reference

__all__ = ["ObjectStore", "Reference"]
