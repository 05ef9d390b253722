"""The biLM's mathematics once more, written from BILM.md alone: loops over words, rows and positions, gradients by
autograd.

Nothing is shared with elmo_ray but the names and layouts of parameters. Slow on purpose; for tiny models in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from elmo_ray.config.model import ModelConfig

Parameters = Mapping[str, Tensor]
State = list[list[list[tuple[Tensor, Tensor]]]]
"""[layer][direction][row] -> (hidden [P], cell [H])"""
Mask = Callable[[int, int, int, int], Tensor]
"""(layer, or n_layers for the top output; direction; time; row) -> what dropout multiplies there, [P]"""


def word_vector(p: Parameters, model: ModelConfig, characters: Sequence[int]) -> Tensor:
    """[P] of one word of `max_characters` ids."""
    config = model.char_cnn
    embedded = [p["char_cnn.embedding"][c] for c in characters]
    found = []
    for i, (width, count) in enumerate(config.filters):
        kernel, bias = p[f"char_cnn.filters.{i}"], p[f"char_cnn.filter_biases.{i}"]
        windows = []
        for start in range(len(characters) - width + 1):
            total = torch.zeros(count, dtype=torch.float64)
            for offset in range(width):
                total = total + kernel[:, :, offset] @ embedded[start + offset]
            windows.append(total + bias)
        best = torch.stack(windows).max(dim=0).values
        found.append(torch.clamp(best, min=0) if config.activation == "relu" else torch.tanh(best))
    x = torch.cat(found)
    for k in range(config.n_highway):
        place = f"char_cnn.highways.{k}."
        gate = torch.sigmoid(x @ p[place + "carry_weight"] + p[place + "carry_bias"])
        transform = torch.clamp(x @ p[place + "transform_weight"] + p[place + "transform_bias"], min=0)
        x = gate * transform + (1 - gate) * x
    if config.projection and sum(count for _, count in config.filters) != model.lstm.projection_dim:
        x = x @ p["char_cnn.projection_weight"] + p["char_cnn.projection_bias"]
    return x


def clip(x: Tensor, bound: float) -> Tensor:
    limit = torch.tensor(bound, dtype=x.dtype)
    return torch.minimum(torch.maximum(x, -limit), limit)


def cell(
    p: Parameters, model: ModelConfig, layer: int, d: int, x: Tensor, h: Tensor, c: Tensor
) -> tuple[Tensor, Tensor]:
    """One step of TensorFlow's LSTMCell; the new (hidden, cell)."""
    config, place = model.lstm, f"lstm.layers.{layer}."
    kernel = torch.cat([p[place + "input_kernel"][d], p[place + "hidden_kernel"][d]])
    i, j, f, o = (torch.cat([x, h]) @ kernel + p[place + "bias"][d]).split(config.dim)
    c = torch.sigmoid(f + 1.0) * c + torch.sigmoid(i) * torch.tanh(j)
    if config.cell_clip is not None:
        c = clip(c, config.cell_clip)
    h = torch.sigmoid(o) * torch.tanh(c)
    if config.dim != config.projection_dim:
        h = h @ p[place + "projection"][d]
        if config.proj_clip is not None:
            h = clip(h, config.proj_clip)
    return h, c


def zero_state(model: ModelConfig, rows: int) -> State:
    lstm, d = model.lstm, 2 if model.bidirectional else 1
    zeros = torch.zeros(lstm.projection_dim, dtype=torch.float64), torch.zeros(lstm.dim, dtype=torch.float64)
    return [[[zeros for _ in range(rows)] for _ in range(d)] for _ in range(lstm.n_layers)]


def state_of(hidden_LDBP: Tensor, cell_LDBH: Tensor) -> State:
    layers, d, rows, _ = hidden_LDBP.shape
    return [
        [[(hidden_LDBP[i, j, b], cell_LDBH[i, j, b]) for b in range(rows)] for j in range(d)] for i in range(layers)
    ]


def stacked(state: State) -> tuple[Tensor, Tensor]:
    """(hidden [L, D, B, P], cell [L, D, B, H])"""
    hidden = [torch.stack([torch.stack([h for h, _ in rows]) for rows in layer]) for layer in state]
    cells = [torch.stack([torch.stack([c for _, c in rows]) for rows in layer]) for layer in state]
    return torch.stack(hidden).detach(), torch.stack(cells).detach()


def run(
    p: Parameters,
    model: ModelConfig,
    vectors: Sequence[Tensor],
    inputs_DBT: Tensor,
    state: State,
    lengths: Sequence[int],
    mask: Mask | None = None,
) -> tuple[list[list[list[list[Tensor]]]], State]:
    """Top outputs [direction][row][time] of the layers, as outputs[layer][direction][row][time], and the new state.

    Only the first `lengths[row]` positions of a row are computed. The top layer's outputs have dropout.
    """
    d, rows, _ = inputs_DBT.shape
    layers = model.lstm.n_layers
    outputs: list[list[list[list[Tensor]]]] = [[[[] for _ in range(rows)] for _ in range(d)] for _ in range(layers)]
    new: State = [[list(rows_) for rows_ in layer] for layer in state]
    for j in range(d):
        for b in range(rows):
            for t in range(lengths[b]):
                x = vectors[int(inputs_DBT[j, b, t])]
                for layer in range(layers):
                    if mask is not None:
                        x = x * mask(layer, j, t, b)
                    h, c = new[layer][j][b]
                    h, c = cell(p, model, layer, j, x, h, c)
                    new[layer][j][b] = h, c
                    x = h + x if layer > 0 and model.lstm.use_skip_connections else h
                    top = layer == layers - 1
                    outputs[layer][j][b].append(x * mask(layers, j, t, b) if top and mask is not None else x)
    return outputs, new


def full_loss(x: Tensor, weight_VP: Tensor, bias_V: Tensor, target: int) -> Tensor:
    logits = [weight_VP[k] @ x + bias_V[k] for k in range(len(weight_VP))]
    return torch.log(sum((torch.exp(value) for value in logits), torch.zeros((), dtype=torch.float64))) - logits[target]


def sampled_loss(
    x: Tensor,
    weight_VP: Tensor,
    bias_V: Tensor,
    target: int,
    negatives: Sequence[int],
    target_log_count: float,
    negative_log_counts: Sequence[float],
) -> Tensor:
    """The target against the negatives that are not the target, each less the logarithm of its expected count."""
    true = weight_VP[target] @ x + bias_V[target] - target_log_count
    logits = [true]
    for k, log_count in zip(negatives, negative_log_counts, strict=True):
        if k != target:
            logits.append(weight_VP[k] @ x + bias_V[k] - log_count)
    return torch.log(torch.stack([torch.exp(value) for value in logits]).sum()) - true


def close(ours: Tensor, reference: Tensor, tolerance: float = 1e-9) -> None:
    """Equal within `tolerance` of the reference's largest value."""
    ours, reference = ours.detach(), reference.detach()
    assert ours.shape == reference.shape
    scale = max(1e-12, float(reference.abs().max())) if reference.numel() else 1.0
    error = float((ours - reference).abs().max()) if reference.numel() else 0.0
    assert error <= tolerance * max(scale, 1e-3), f"off by {error:.2e}, largest value {scale:.2e}"
