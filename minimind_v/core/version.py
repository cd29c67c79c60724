"""The version of mmv."""

__version__ = "0.1.0"
