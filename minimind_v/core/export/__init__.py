"""Write a model for other programs, and compare the result."""
