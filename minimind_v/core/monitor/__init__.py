"""What a run records and reports: metrics, diagnostics, messages."""
