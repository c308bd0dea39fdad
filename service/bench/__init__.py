"""Measurements of running processes, for `patchforge bench`."""
