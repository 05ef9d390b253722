"""Probabilities of words by a trained biLM; the code is in `elmo_ray.elmo.language_model`."""

from elmo_ray.elmo.language_model import LanguageModel, Substitutes, Surprisal

__all__ = ["LanguageModel", "Substitutes", "Surprisal"]
