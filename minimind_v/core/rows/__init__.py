"""Rows and their picture files, read where they are."""
