"""Trains, judges and exports ELMo bidirectional language models on Ray; `python -m elmo_ray` lists the verbs."""

__version__ = "0.1.0"
