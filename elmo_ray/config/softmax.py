"""Section `softmax`, and the facts about each kind of softmax that are needed before there is a model.

A new kind of softmax is a class in `model/softmax.py` or beside it, with an entry in `KINDS` there, and a row here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import Field

from elmo_ray.config.schema import Int, Section
from elmo_ray.errors import ConfigError


@dataclass(frozen=True)
class SoftmaxKind:
    """Facts about a kind of softmax.

    samples_words: a step draws `softmax.negatives` words, against which it trains. has_table: there is one vector for
    each word; these kinds have the same parameters, so that a run may change from one to another. has_fixed_shapes:
    the shapes within a step do not depend on which words it has. fewest_words: the smallest vocabulary. order: what the
    kind does because of the order of the vocabulary, as a part of a message; empty if the order does not matter.
    """

    samples_words: bool = False
    has_table: bool = True
    has_fixed_shapes: bool = True
    fewest_words: int = 1
    order: str = ""


SOFTMAX_KINDS = {
    "sampled": SoftmaxKind(samples_words=True, order="draws the words of the first lines most often"),
    "full": SoftmaxKind(),
    "adaptive": SoftmaxKind(
        has_table=False,
        has_fixed_shapes=False,
        fewest_words=20,
        order="gives the words of the first lines most numbers",
    ),
}
"""The kinds of softmax by the values of `softmax.kind`."""


class SoftmaxConfig(Section):
    """Section `softmax`."""

    path: ClassVar[str] = "softmax."
    kind: Literal["sampled", "full", "adaptive"] = Field(
        "sampled", description="The loss in training; evaluation is exact. adaptive needs words in falling count."
    )
    negatives: Int = Field(
        1024, ge=1, le=1 << 24, description="Words sampled per step and direction; all positions share them."
    )
    tied: bool = Field(False, description="Use the word table of model.input=words as the weights of the softmax.")

    @property
    def facts(self) -> SoftmaxKind:
        """Facts about the kind that is set."""
        return SOFTMAX_KINDS[self.kind]

    def _unused(self) -> dict[str, str]:
        unused = {"negatives": f"softmax.kind={self.kind} samples no words; remove one of them"}
        return {} if self.facts.samples_words else unused

    def _contradictions(self) -> Iterator[str]:
        if self.tied and not self.facts.has_table:
            yield f"softmax.kind={self.kind} has no table for all words, so softmax.tied=true has nothing to share"

    def check_vocabulary(self, n_words: int) -> None:
        """Raise ConfigError if the vocabulary of `n_words` words is too small for this kind of softmax."""
        if self.facts.samples_words and self.negatives >= n_words:
            raise ConfigError(
                f"softmax.negatives={self.negatives}: must be below the number of words in the vocabulary, {n_words}; "
                "lower it, or set softmax.kind=full, which suits a small vocabulary"
            )
        if n_words < self.facts.fewest_words:
            raise ConfigError(
                f"softmax.kind={self.kind} needs a vocabulary of {self.facts.fewest_words} words or more, and there "
                f"are {n_words}; use softmax.kind=full"
            )
