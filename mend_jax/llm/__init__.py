"""The frozen LLM, behind one interface for decoders and encoder–decoders."""
