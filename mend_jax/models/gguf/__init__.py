"""GGUF files: a model whole in one file, its weights in blocks of few bits. They answer what a Hugging Face folder answers."""
