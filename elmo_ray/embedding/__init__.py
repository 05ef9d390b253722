"""Embedding of texts: what is read, what a worker makes of it, what is written."""
