"""AWQ's search (arXiv 2306.00978): a scale for each input channel, so that those which matter round finely.

W x = (W · s) (x / s): the matrix is rounded after its columns were multiplied by s, and x / s costs nothing because s
is folded into what makes x (`groups.fold`). Here the loss is taken on the Gram matrix (`gram`), so a candidate costs
one product, whatever the number of calibration tokens.
"""

import torch
from torch import Tensor

from lmtool.quant.gram import gram_loss
from lmtool.quant.grid import Levels, grid_of, rounded

# powers of the activations that are tried: first these, then both sides of the best, nearer each time
COARSE = (0.1, 0.3, 0.5, 0.7, 0.9)
FINER = (0.1, 0.05)
# a loss over this many rows ranks the candidates as well as one over all
MOST_ROWS = 128
_SMALLEST = 1e-4


def search_scale(
    weight: Tensor, gram: Tensor, mean_abs: Tensor, levels: Levels, *, shared_by: tuple[int, int] | None = None
) -> tuple[Tensor, float]:
    """The scale [K] with the least loss among candidates, and that loss as a share of plain rounding's.

    weight float32 [N, K], all rows that share the input; gram [K, K]; mean_abs [K];
    shared_by (Hkv, G): K is Hkv · G · D, and the G heads of a group take one scale (v → o under GQA).
    """
    rows = weight[:: -(-weight.shape[0] // MOST_ROWS)]
    plain = _loss(rows, gram, None, levels)
    activations, weights = _share(mean_abs, shared_by), _share(_weight_term(weight, levels.group_size), shared_by)

    def scale_at(power: float, by_weights: bool) -> Tensor:
        scale = activations**power
        return _normalised(scale / weights ** (1 - power) if by_weights else scale)

    def loss_at(power: float, by_weights: bool) -> float:
        return _loss(rows, gram, scale_at(power, by_weights), levels)

    tried = {(power, by_weights): loss_at(power, by_weights) for power in COARSE for by_weights in (False, True)}
    for step in FINER:
        power, by_weights = min(tried, key=lambda point: tried[point])
        for near in (power - step, power + step):
            tried[near, by_weights] = loss_at(near, by_weights)
    point = min(tried, key=lambda point: tried[point])
    if not tried[point] < plain:
        return torch.ones_like(mean_abs), 1.0
    return scale_at(*point), tried[point] / plain


def smoothing_scale(
    weight: Tensor, mean_abs: Tensor, group_size: int, *, shared_by: tuple[int, int] | None = None
) -> Tensor:
    """No search: half activations, half weights (SmoothQuant's α = 0.5, what LMDeploy does without --search-scale)."""
    activations = _share(mean_abs, shared_by)
    return _normalised(activations.sqrt() / _share(_weight_term(weight, group_size), shared_by).sqrt())


def _loss(weight: Tensor, gram: Tensor, scale: Tensor | None, levels: Levels) -> float:
    if scale is None:
        delta = rounded(weight, grid_of(weight, levels)) - weight
    else:
        scaled = weight * scale
        delta = rounded(scaled, grid_of(scaled, levels)).div_(scale).sub_(weight)
    return float(gram_loss(delta, gram).sum())


def _weight_term(weight: Tensor, group_size: int) -> Tensor:
    """[K]: how large a column's weights are beside the largest of their group, mean over rows."""
    grouped = weight.abs().view(weight.shape[0], -1, group_size)
    largest = grouped.amax(dim=-1, keepdim=True).clamp_(min=1e-12)
    return (grouped / largest).mean(dim=0).flatten()


def _share(values: Tensor, shared_by: tuple[int, int] | None) -> Tensor:
    values = values.clamp(min=_SMALLEST)
    if shared_by is None:
        return values
    per_head = values.view(*shared_by, -1)
    return per_head.mean(dim=1, keepdim=True).expand_as(per_head).flatten()


def _normalised(scale: Tensor) -> Tensor:
    return (scale / (scale.max() * scale.min()).sqrt()).clamp_(min=_SMALLEST)
