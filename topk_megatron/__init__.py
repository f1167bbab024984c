"""TopK language models on Megatron-Core: interpretable by construction, trained at scale."""

__version__ = "0.1.0"
