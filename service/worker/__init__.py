"""The worker: claims jobs, packs their patches into evaluations, publishes what comes of it."""
