"""The Patch Forcing model: networks, samplers, bundles, training. Knows nothing of the service."""

from patchforge.model.openmp import spin_shortly

# Before anything here loads torch, because OpenMP reads its environment only once.
spin_shortly()
