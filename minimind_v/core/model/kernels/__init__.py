"""Faster replacements for modules of the plain model."""
