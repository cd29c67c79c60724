"""The model as papers write it: vision encoder, projector, language model."""
