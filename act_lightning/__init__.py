"""ACT (Action Chunking with Transformers) on PyTorch Lightning: record, train, roll out."""

__version__ = "0.1.0"
