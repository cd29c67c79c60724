"""MiniMind-V: train, understand and use a tiny vision-language model."""

__version__ = "0.1.0"
