"""Read and write models in every supported format."""
