"""The frozen LLM, with one interface for decoders and encoder–decoders."""
