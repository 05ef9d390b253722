"""The biLM in use: sentences to vectors, probabilities and neighbours, without Ray."""

from elmo_ray.elmo.layer import Elmo, batch_to_ids

__all__ = ["Elmo", "batch_to_ids"]
