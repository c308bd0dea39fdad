"""The network side of Patchforge: REST, OpenAI-compatible REST and gRPC over one job queue. Never imports torch."""
