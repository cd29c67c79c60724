"""Answers: sampling, caches and conversations."""
