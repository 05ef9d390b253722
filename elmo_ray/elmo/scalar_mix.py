"""The mixture of a biLM's layers that a task learns: gamma * sum(softmax(w)[k] * layer[k])."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from elmo_ray.errors import ConfigError

_VARIANCE_FLOOR = 1e-13
"""Value of AllenNLP. bilm-tf adds 1e-12; in float32 the two differ only for layers that are almost constant."""


class ScalarMix(nn.Module):
    """Mixture of `mixture_size` tensors of one shape, with learned weights `scalar_parameters` and a learned `gamma`.

    do_layer_norm: bring each tensor to mean 0 and variance 1 first, over all unmasked positions of the batch and all
    dimensions together, as bilm-tf and AllenNLP do. initial_scalar_parameters: weights before the softmax, zeros by
    default; [-9e10, 1, -9e10] selects the middle one of three tensors. trainable: train the weights and gamma.
    l2_coef and use_top_only are those of bilm-tf: `regularization` is l2_coef * sum(w ** 2); with use_top_only the
    result is gamma times the last tensor, without weights or layer norm. Raises ConfigError for settings that do not
    fit.
    """

    def __init__(
        self,
        mixture_size: int,
        do_layer_norm: bool = False,
        initial_scalar_parameters: Sequence[float] | None = None,
        trainable: bool = True,
        l2_coef: float | None = None,
        use_top_only: bool = False,
    ):
        super().__init__()
        if initial_scalar_parameters is None:
            initial_scalar_parameters = [0.0] * mixture_size
        elif use_top_only:
            raise ConfigError("initial_scalar_parameters have no effect with use_top_only; leave one of them out")
        elif len(initial_scalar_parameters) != mixture_size:
            raise ConfigError(
                f"initial_scalar_parameters={list(initial_scalar_parameters)}: has {len(initial_scalar_parameters)} "
                f"numbers for {mixture_size} layers"
            )
        if use_top_only and do_layer_norm:
            raise ConfigError("do_layer_norm has no effect with use_top_only; leave one of them out")
        self.mixture_size, self.do_layer_norm = mixture_size, do_layer_norm
        self.l2_coef, self.use_top_only = l2_coef, use_top_only
        # one parameter of one number for each layer, by the names of AllenNLP, so that its saved mixtures load
        self.scalar_parameters = nn.ParameterList(
            nn.Parameter(torch.tensor([float(value)]), requires_grad=trainable)
            for value in ([] if use_top_only else initial_scalar_parameters)
        )
        self.gamma = nn.Parameter(torch.ones(1), requires_grad=trainable)

    def forward(self, tensors: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
        """Return the mixture, which has the shape of the tensors, [..., positions, dimensions].

        mask: [..., positions], needed for the layer norm. Raises ConfigError for another number of tensors, or where
        the layer norm has no mask.
        """
        if len(tensors) != self.mixture_size:
            raise ConfigError(f"{len(tensors)} tensors were given to a mixture of {self.mixture_size}")
        if self.use_top_only:
            return self.gamma * tensors[-1]
        if self.do_layer_norm:
            if mask is None:
                raise ConfigError("do_layer_norm needs the mask of the positions that count")
            tensors = [_layer_norm(tensor, mask[..., None].to(tensor.dtype)) for tensor in tensors]
        weights = torch.softmax(torch.cat(list(self.scalar_parameters)), dim=0)
        mixed = weights[0] * tensors[0]
        for weight, tensor in zip(weights[1:], tensors[1:], strict=True):
            mixed = torch.addcmul(mixed, weight, tensor)
        return self.gamma * mixed

    def regularization(self) -> Tensor:
        """Return the term to add to a task's loss: 0 without l2_coef or with use_top_only."""
        if not self.l2_coef or self.use_top_only:
            return self.gamma.new_zeros(())
        return self.l2_coef * torch.cat(list(self.scalar_parameters)).square().sum()


def _layer_norm(x: Tensor, mask: Tensor) -> Tensor:
    count = mask.sum() * x.shape[-1]
    mean = (x * mask).sum() / count
    variance = (((x - mean) * mask) ** 2).sum() / count
    return (x - mean) / torch.sqrt(variance + _VARIANCE_FLOOR)
