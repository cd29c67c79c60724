"""llama.cpp's files: the language model (`model.gguf`) and what lets it see (`mmproj.gguf`), both ways."""
