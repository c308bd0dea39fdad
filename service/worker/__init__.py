"""The worker: claims jobs, packs their patches into network evaluations, and publishes the results."""
