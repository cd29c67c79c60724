"""Every reading function against files that were changed at random: `python -m tests.fuzz`, `make fuzz`."""
