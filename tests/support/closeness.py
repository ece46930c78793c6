"""The one place where tests compare tensors."""

from __future__ import annotations

import torch

__all__ = ["assert_close", "relative_error"]


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """``||actual - expected|| / ||expected||`` in float64; infinite where actual is not finite."""
    a, e = actual.detach().double().cpu(), expected.detach().double().cpu()
    if not torch.isfinite(a).all():
        return float("inf")
    scale = e.norm().item()
    return ((a - e).norm() / scale).item() if scale > 0 else (a - e).norm().item()


def assert_close(name: str, actual: torch.Tensor, expected: torch.Tensor, budget: float) -> None:
    """Fail with the tensor's name, its worst index, the error and the budget."""
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    error = relative_error(actual, expected)
    if error <= budget:
        return
    difference = (actual.detach().double().cpu() - expected.detach().double().cpu()).abs()
    worst = int(torch.nan_to_num(difference, nan=float("inf")).argmax()) if difference.numel() else 0
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), actual.shape))
    raise AssertionError(
        f"{name}: relative error {error:.3e} over budget {budget:.1e}; worst at {index}: "
        f"{actual[index].item():.8g}, expected {expected[index].item():.8g}"
    )
