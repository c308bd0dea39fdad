"""Patchforge's own gRPC interface."""
