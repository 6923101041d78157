"""AWQ's search (arXiv 2306.00978): a scale for each input channel, so that those which matter round finely.

W x = (W · s) (x / s): the matrix is rounded after its columns were multiplied by s, and x / s costs nothing because s
is folded into what makes x (`groups.fold`). Here the loss is taken on the Gram matrix (`gram`), so a candidate costs
one product, whatever the number of calibration tokens.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from lmtool.quant.gram import gram_loss
from lmtool.quant.grid import grid_of, rounded

NUM_POINTS = 20
# a loss over this many rows ranks the candidates as well as one over all
MOST_ROWS = 128
_SMALLEST = 1e-4


def search_scale(
    weight: Tensor, gram: Tensor, mean_abs: Tensor, group_size: int, *, shared_by: tuple[int, int] | None = None
) -> tuple[Tensor, float]:
    """The scale [K] with the least loss among candidates, and that loss as a share of plain rounding's.

    weight float32 [N, K], all rows that share the input; gram [K, K]; mean_abs [K];
    shared_by (Hkv, G): K is Hkv · G · D, and the G heads of a group take one scale (v → o under GQA).
    """
    rows = weight[:: -(-weight.shape[0] // MOST_ROWS)]
    best, best_loss = torch.ones_like(mean_abs), _loss(rows, gram, None, group_size)
    plain = best_loss
    for scale in _candidates(weight, mean_abs, shared_by, group_size):
        loss = _loss(rows, gram, scale, group_size)
        if loss < best_loss:
            best, best_loss = scale, loss
    return best, best_loss / plain if plain > 0 else 1.0


def smoothing_scale(
    weight: Tensor, mean_abs: Tensor, group_size: int, *, shared_by: tuple[int, int] | None = None
) -> Tensor:
    """No search: half activations, half weights (SmoothQuant's α = 0.5, what LMDeploy does without --search-scale)."""
    activations = _share(mean_abs, shared_by)
    return _normalised(activations.sqrt() / _share(_weight_term(weight, group_size), shared_by).sqrt())


def _loss(weight: Tensor, gram: Tensor, scale: Tensor | None, group_size: int) -> float:
    if scale is None:
        delta = rounded(weight, grid_of(weight, group_size)) - weight
    else:
        scaled = weight * scale
        delta = rounded(scaled, grid_of(scaled, group_size)).div_(scale).sub_(weight)
    return float(gram_loss(delta, gram).sum())


def _candidates(
    weight: Tensor, mean_abs: Tensor, shared_by: tuple[int, int] | None, group_size: int
) -> Iterator[Tensor]:
    activations = _share(mean_abs, shared_by)
    weights = _share(_weight_term(weight, group_size), shared_by)
    for i in range(1, NUM_POINTS + 1):
        power = i / NUM_POINTS
        yield _normalised(activations**power)
        if i < NUM_POINTS:
            yield _normalised(activations**power / weights ** (1 - power))


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
