"""Answers in the LLM's own words."""
