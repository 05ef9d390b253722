"""Use of a trained biLM without Ray: vectors, word probabilities and nearest words of sentences."""

from elmo_ray.elmo.layer import Elmo, batch_to_ids

__all__ = ["Elmo", "batch_to_ids"]
