"""Home of the gRPC stubs that `make setup` generates from `proto/`."""
