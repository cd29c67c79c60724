"""Speed, put on the plain model from outside."""
