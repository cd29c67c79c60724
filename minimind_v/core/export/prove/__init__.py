"""The answers of other programs, for the comparison of an export."""
