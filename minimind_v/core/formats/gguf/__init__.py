"""Files for llama.cpp."""
