"""The network face of Patchforge: REST, OpenAI-compatible REST and gRPC over one job queue; free of torch."""
