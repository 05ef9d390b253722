"""Checkpoints in folders and object stores: writing, reading, checks and identity; and models of other programs."""
