"""The GPU path on one card: proven part by part, then measured. `python -m benchmarks.gpu --help`."""
