"""The embedded world and the pipeline that runs on it."""
