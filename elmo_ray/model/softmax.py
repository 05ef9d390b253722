"""The softmax over the vocabulary: full, sampled and adaptive. The draws of the sampled one are in `training/noise.py`.

Shapes: D directions, N positions, P projection, V vocabulary, K negatives, R touched rows of the table.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elmo_ray import kernels
from elmo_ray.kernels.hints import SortedPositions
from elmo_ray.model.product import product


def full_losses(
    x_NP: Tensor, weight_VP: Tensor, bias_V: Tensor, targets_N: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """Return [N] losses in nats over the whole vocabulary, differentiable; targets of -1 give 0."""
    weight_PV = weight_VP.t() if dtype is None else weight_VP.t().to(dtype)
    return F.cross_entropy(product(x_NP, weight_PV) + bias_V, targets_N, ignore_index=-1, reduction="none")


def sampled_losses(
    x_DNP: Tensor,
    rows_RP: Tensor,
    bias_R: Tensor,
    target_rows_DN: Tensor,
    target_log_count_DN: Tensor,
    negative_rows_DK: Tensor,
    negative_log_count_DK: Tensor,
    dtype: torch.dtype | None = None,
    mask_hits: bool = True,
    positions: SortedPositions | None = None,
) -> Tensor:
    """Return [D, N] losses in nats of each position against its target and the negatives of its direction.

    rows_RP, bias_R: the touched rows of the table; the two `_rows_` arguments index them, and a direction's negatives
    are distinct. A negative that is a position's target is masked (bilm-tf always does), and the log expected count is
    subtracted from every logit. dtype: of the products. positions: of the target rows, for kernels that would have to
    sort them.
    """
    if run := kernels.sampled_losses(x_DNP, negative_rows_DK, positions):
        return run(
            x_DNP,
            rows_RP,
            bias_R,
            target_rows_DN,
            target_log_count_DN,
            negative_rows_DK,
            negative_log_count_DK,
            dtype,
            mask_hits,
        )
    bias_R1 = bias_R[:, None]  # gathered as an embedding too: its gradient is summed in a fixed order
    true = (x_DNP * F.embedding(target_rows_DN, rows_RP)).sum(-1)
    true = true + F.embedding(target_rows_DN, bias_R1)[..., 0] - target_log_count_DN
    weight_DPK = F.embedding(negative_rows_DK, rows_RP).transpose(1, 2)
    offset_DK = F.embedding(negative_rows_DK, bias_R1)[..., 0] - negative_log_count_DK
    sampled = product(x_DNP, weight_DPK if dtype is None else weight_DPK.to(dtype)) + offset_DK[:, None]
    if mask_hits:
        sampled = sampled.masked_fill(target_rows_DN[:, :, None] == negative_rows_DK[:, None], -math.inf)
    return torch.logsumexp(torch.cat([true[..., None], sampled], dim=-1), dim=-1) - true


class ExactLosses:
    """Losses over the whole vocabulary without gradients, in chunks of positions. dtype: of the products."""

    def __init__(self, weight_VP: Tensor, bias_V: Tensor, dtype: torch.dtype | None = None, rows: int = 256):
        self.weight, self.bias, self.dtype, self.rows = weight_VP.detach(), bias_V.detach(), dtype, rows

    @torch.no_grad()
    def losses(self, x_NP: Tensor, targets_N: Tensor) -> Tensor:
        """Return [N] losses in nats; targets of -1 give 0."""
        each = zip(x_NP.split(self.rows), targets_N.split(self.rows), strict=True)
        found = [full_losses(x, self.weight, self.bias, targets, self.dtype) for x, targets in each]
        return torch.cat(found) if found else x_NP.new_zeros(0)


class Drawn(NamedTuple):
    """Draws of a step of the sampled softmax: arguments of `sampled_losses`."""

    rows_RP: Tensor
    bias_R: Tensor
    target_rows_DN: Tensor
    target_log_count_DN: Tensor
    negative_rows_DK: Tensor
    negative_log_count_DK: Tensor
    positions: SortedPositions | None = None


class FullSoftmax:
    """A softmax with a table [V, P] and a bias [V], trained over the whole vocabulary.

    This is the seam for other kinds: a class with these methods, an entry in `KINDS`, and a row in `config/softmax.py`.
    A kind has no tensors of its own; parameters are the biLM's, under names that begin with `softmax`.
    """

    def add_parameters(self, model: Any, n_words: int, width: int, tied: bool) -> None:
        """Give the model the parameters for so many words; with a tied table the word embedding is the weight."""
        model.softmax_weight = nn.Parameter(torch.empty(n_words, width)) if not tied else None
        model.softmax_bias = nn.Parameter(torch.zeros(n_words))

    def reset_parameters(self, model: Any, generator: torch.Generator) -> None:
        """Draw initial values as the original does."""
        if model.softmax_weight is not None:
            model.softmax_weight.normal_(0.0, math.sqrt(1.0 / model.softmax_weight.shape[1]), generator=generator)
        model.softmax_bias.zero_()

    def losses(
        self, model: Any, x_DNP: Tensor, targets_DN: Tensor, drawn: Drawn | None, dtype: torch.dtype | None
    ) -> Tensor:
        """Return [D, N] losses in nats for training, 0 where the target is -1. dtype: of the products."""
        each = zip(x_DNP, targets_DN, strict=True)
        weight, bias = model.output_weight, model.softmax_bias
        return torch.stack([full_losses(x, weight, bias, targets, dtype) for x, targets in each])

    def exact(self, model: Any, dtype: torch.dtype | None = None, rows: int = 256) -> Any:
        """Return an object whose `losses(x_NP, targets_N)` are exact and have no gradient, as evaluation needs them.

        rows: about how many positions it will be asked for at a time.
        """
        fastest = kernels.full_losses(model.output_weight) or ExactLosses
        return fastest(model.output_weight, model.softmax_bias, dtype, rows)

    def log_probabilities(self, model: Any, x_NP: Tensor) -> Tensor:
        """Return [N, V] log probabilities of all words."""
        return torch.log_softmax(torch.addmm(model.softmax_bias, x_NP, model.output_weight.t()), dim=1)

    def operations(self, model: Any, negatives: int) -> float:
        """Return the floating point operations of the products in `losses` for one position in one direction."""
        return 2.0 * model.output_weight.numel()


class SampledSoftmax(FullSoftmax):
    """The same parameters, trained against a few negatives that are drawn for each step."""

    def losses(
        self, model: Any, x_DNP: Tensor, targets_DN: Tensor, drawn: Drawn | None, dtype: torch.dtype | None
    ) -> Tensor:
        assert drawn is not None
        losses_DN = sampled_losses(x_DNP, *drawn[:6], dtype, positions=drawn.positions)
        return torch.where(targets_DN >= 0, losses_DN, 0.0)

    def operations(self, model: Any, negatives: int) -> float:
        return 2.0 * model.output_weight.shape[1] * (negatives + 1)


class AdaptiveSoftmax(FullSoftmax):
    """Frequent words in a head, rarer ones in clusters with ever smaller vectors (Grave et al. 2017).

    It is torch's module, as the model's `softmax`, and computes in the parameters' own type.
    """

    def add_parameters(self, model: Any, n_words: int, width: int, tied: bool) -> None:
        # the head has a tenth of the words, and each cluster five times as many as there are before it
        cutoffs = [c for c in (n_words // 10, n_words // 2) if c]
        # vectors of each cluster are shorter by this factor than those before, and never empty
        shorter = min(4, math.isqrt(width))
        model.softmax = nn.AdaptiveLogSoftmaxWithLoss(width, n_words, cutoffs, div_value=shorter, head_bias=True)

    def reset_parameters(self, model: Any, generator: torch.Generator) -> None:
        for parameter in model.softmax.parameters():
            deviation = math.sqrt(1.0 / parameter.shape[-1]) if parameter.ndim > 1 else 0.0
            parameter.normal_(0.0, deviation, generator=generator)

    def losses(
        self, model: Any, x_DNP: Tensor, targets_DN: Tensor, drawn: Drawn | None, dtype: torch.dtype | None
    ) -> Tensor:
        found = [self._losses(model, x, targets) for x, targets in zip(x_DNP, targets_DN, strict=True)]
        return torch.stack(found)

    def exact(self, model: Any, dtype: torch.dtype | None = None, rows: int = 256) -> Any:
        return _AdaptiveLosses(self, model)

    def log_probabilities(self, model: Any, x_NP: Tensor) -> Tensor:
        found: Tensor = model.softmax.log_prob(x_NP)
        return found

    def operations(self, model: Any, negatives: int) -> float:
        bounds = itertools.pairwise(model.softmax.cutoffs)  # the last one is the number of words
        total = 2.0 * model.softmax.head.weight.numel()
        for (first, last), cluster in zip(bounds, model.softmax.tail, strict=True):
            # the share of words in the cluster, by the law of which the sampled softmax draws words
            share = math.log((last + 1) / (first + 1)) / math.log(model.n_words + 1)
            total += 2.0 * share * sum(part.weight.numel() for part in cluster)
        return total

    def _losses(self, model: Any, x_NP: Tensor, targets_N: Tensor) -> Tensor:
        log_p_N, _ = model.softmax(x_NP, targets_N.clamp_min(0))
        return torch.where(targets_N >= 0, -log_p_N, 0.0)


class _AdaptiveLosses:
    def __init__(self, kind: AdaptiveSoftmax, model: Any):
        self.kind, self.model = kind, model

    @torch.no_grad()
    def losses(self, x_NP: Tensor, targets_N: Tensor) -> Tensor:
        return self.kind._losses(self.model, x_NP, targets_N)


KINDS: dict[str, FullSoftmax] = {
    "sampled": SampledSoftmax(),
    "full": FullSoftmax(),
    "adaptive": AdaptiveSoftmax(),
}
"""The kinds of softmax by the values of `softmax.kind`."""
