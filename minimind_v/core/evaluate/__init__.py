"""Measure a model on held-out rows."""
