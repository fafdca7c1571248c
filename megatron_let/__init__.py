"""Pre-training of large language models with the help of small ones, on Megatron-Core."""

__version__ = "0.2.0"
