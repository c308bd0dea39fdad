"""Bundles and checkpoints on disk. All files from strangers are read here, and checked before use."""
