"""Averages of gradients over all workers, sent as they are or as bfloat16."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def average(gradient: Tensor, world: int, sent_as: str) -> None:
    """Replace a gradient by its mean over all workers, in place.

    sent_as: `full`, or `bf16` for half the bytes and 8 bits of precision.
    """
    if sent_as == "bf16":
        sent = (gradient / world).to(torch.bfloat16)
        dist.all_reduce(sent)
        gradient.copy_(sent)
    else:
        dist.all_reduce(gradient)
        gradient /= world


def send_as_bf16(model: Any) -> None:
    """Let DistributedDataParallel send the dense gradients as bfloat16, like `average`."""
    model.register_comm_hook(None, _as_bf16)


# without annotations: torch checks them and does not take strings
def _as_bf16(state, bucket):  # type: ignore[no-untyped-def]
    """Call torch's own hook."""
    # by another name: torch refuses that hook with gloo by its name, although gloo can add bfloat16
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

    return default_hooks.bf16_compress_hook(state, bucket)
