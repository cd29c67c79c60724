"""Folders for transformers."""
