"""Checkpoints: written, read, checked and identified, in a folder or an object store; and models of other programs."""
