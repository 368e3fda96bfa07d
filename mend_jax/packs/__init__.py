"""Packs: vectors in a file of their own, to keep, to send and to use again."""
