"""The core of mmv: one package per stage of the pipeline."""
