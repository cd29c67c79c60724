"""Trains the demo's assets: a tokenizer, a tiny vision encoder and a text-only language model."""
