"""Requests and answers of `serve`: JSON with tokenised sentences in, JSON or safetensors with vectors out.

A request is `{"sentences": [["The", "cat"], ["Yes"]], "layers": "top"}`; without "layers" the server's own choice
counts. The answer has [layers, words, dimensions] for each sentence, in the order of the request. A mistake is answered
by a status of HTTP from 400 on and one line of JSON, `{"error": "..."}`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic_core import to_json
from safetensors.numpy import save

from elmo_ray.config.model import ModelConfig, layer_choice
from elmo_ray.elmo.encoder import check_sentences
from elmo_ray.elmo.layer_choice import LayerChoice, layer_factors
from elmo_ray.errors import ConfigError, ElmoRayError, short
from elmo_ray.serve.config import ServeOptions

JSON, SAFETENSORS = "application/json", "application/safetensors"

Factors = tuple[float, ...] | None
"""Factor of each layer in a sum; None for all layers side by side."""


class RequestError(ElmoRayError):
    """Mistake of a client. status: that of the answer."""

    def __init__(self, status: int, message: str):
        super().__init__(short(message, 500))
        self.status = status


@dataclass(frozen=True)
class Wanted:
    """Sentences of one request, each a list of words, and the layers that it asks for."""

    sentences: list[list[str]]
    factors: Factors

    @property
    def positions(self) -> int:
        """The number of words and of the two markers of each sentence."""
        return sum(map(len, self.sentences)) + 2 * len(self.sentences)


def read_request(body: bytes, limits: ServeOptions, model: ModelConfig) -> Wanted:
    """Return what a request asks for. Raises RequestError for wrong JSON (400) and for too much of it (413)."""
    values = _parse(body)
    if not isinstance(values, dict) or "sentences" not in values:
        raise RequestError(400, 'the body must be an object such as {"sentences": [["The", "cat"], ["Yes"]]}')
    if unknown := [key for key in values if key not in ("sentences", "layers")]:
        raise RequestError(400, f"{unknown[0]!r}: a request has sentences and layers and nothing else")
    sentences = values["sentences"]
    if not isinstance(sentences, list):
        raise RequestError(400, "sentences must be a list of lists of words, as [['The', 'cat']]")
    if len(sentences) > limits.max_sentences:
        raise too_much(len(sentences), "sentences", "max_sentences", limits)
    try:
        check_sentences(sentences)
        _check_characters(sentences)
        choice: LayerChoice = layer_choice(values["layers"]) if "layers" in values else limits.layers
        factors = layer_factors(choice, model, "layers")
    except (TypeError, ConfigError) as error:
        raise RequestError(400, str(error)) from None
    except ValueError:
        raise RequestError(
            400, f"layers={values['layers']!r}: must be all, top, average or a list of numbers"
        ) from None
    words = sum(map(len, sentences))
    if words > limits.max_words:
        raise too_much(words, "words", "max_words", limits)
    return Wanted(sentences, factors)


def too_much(count: int | None, what: str, name: str, limits: ServeOptions) -> RequestError:
    """Return the error of a request that exceeds the limit `serve.name`. count: None where the end was not read."""
    number = "more" if count is None else f"{count:,}"
    limit = getattr(limits, name)
    return RequestError(413, f"the request has {number} {what} and may have serve.{name}={limit}; send it in parts")


def check_encoding(encoding: str | None) -> None:
    """Raise RequestError (415) if the header Content-Encoding names a compression: bodies are read as they come."""
    if (encoding or "identity").strip().lower() != "identity":
        raise RequestError(415, f"Content-Encoding: {encoding}: send the body without compression")


def _parse(body: bytes) -> Any:
    if not body:
        raise RequestError(400, 'the request has no body; send {"sentences": [["The", "cat"], ["Yes"]]}')
    try:
        return json.loads(body.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RequestError(400, f"the body is no JSON in UTF-8: byte {error.start} is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise RequestError(
            400, f"the body is no JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from None
    except (RecursionError, ValueError):  # thousands of brackets, or of digits
        raise RequestError(400, "the body is no usable JSON: it nests too deeply or has a huge number") from None


def _check_characters(sentences: Sequence[Sequence[str]]) -> None:
    """Raise TypeError for half of a surrogate pair, which JSON can hold and UTF-8 cannot."""
    for number, words in enumerate(sentences):
        try:
            "".join(words).encode("utf-8")
        except UnicodeEncodeError:
            raise TypeError(f"sentence {number} has half of a surrogate pair, which is no character") from None


def answer_type(accept: str | None) -> str:
    """Return the media type of the answer by the header Accept; JSON where it allows both equally or is not there.

    Raises RequestError (406) where it allows neither.
    """
    if not (accept or "").strip():
        return JSON
    best: dict[str, float] = {}
    for item in str(accept).lower().split(","):
        name, *parameters = (part.strip() for part in item.split(";"))
        for kind in (JSON, SAFETENSORS):
            if name in (kind, "application/*", "*/*"):
                best[kind] = max(best.get(kind, 0.0), _quality(parameters))
    kind = max((JSON, SAFETENSORS), key=lambda kind: best.get(kind, 0.0))
    if not best.get(kind, 0.0):
        raise RequestError(406, f"Accept: {accept}: the answer is {JSON} or {SAFETENSORS}")
    return kind


def _quality(parameters: Sequence[str]) -> float:
    for parameter in parameters:
        if parameter.startswith("q="):
            try:
                return float(parameter[2:])
            except ValueError:
                return 0.0
    return 1.0


def write_answer(vectors: Sequence[NDArray[np.float32]], kind: str) -> bytes:
    """Return the body of an answer with the vectors [layers, words, dimensions] of each sentence.

    In JSON they are the list `vectors`, and a number is exactly that of float32; one that is not finite is null. In
    safetensors the names are the numbers of the sentences, from 0.
    """
    if kind == SAFETENSORS:
        return bytes(save({str(number): np.ascontiguousarray(each) for number, each in enumerate(vectors)}))
    # json.dumps takes 17 times as long
    return bytes(to_json({"vectors": [each.tolist() for each in vectors]}, inf_nan_mode="null")) + b"\n"
