"""On a Ray cluster: left out of `make test`, run by `make test-ray`."""
