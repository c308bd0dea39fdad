"""Results outside the queue server: pictures in an S3-compatible object store. docs/operation.md explains the setup."""

from patchforge.service.results.store import ObjectStore, Reference

__all__ = ["ObjectStore", "Reference"]
