"""Check, count, preview, convert and split rows."""
