"""Is a result right? One measure and one tolerance for each dtype, for everything that is timed."""

import torch
from torch import Tensor

# of ‖out - reference‖ / ‖reference‖, the reference in float32 on the same inputs: a few roundings of the dtype
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def relative_error(found: Tensor, expected: Tensor) -> float:
    """‖found - expected‖ / ‖expected‖ in float64; NaN where either holds one. Same shapes."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    difference = (found.double() - expected.double()).norm()
    return float(difference / expected.double().norm().clamp_min(1e-30))
