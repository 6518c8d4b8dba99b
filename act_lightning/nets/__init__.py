"""Plain PyTorch networks: no Lightning, no files, no simulators."""
