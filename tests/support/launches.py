"""A file of launches, and GPUs for which it may have some."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import torch

from sla_compile.kernels.triton.launches import Launch

OURS = Launch(32, 16, 32, 8, 5)
FIELDS = asdict(OURS)
HALF = (64, torch.bfloat16, 64, 64)


def entry(**changes: Any) -> dict[str, Any]:
    """A file with one launch of the forward at 64, half, on 8.9; None takes a field out."""
    fields = {name: value for name, value in {**FIELDS, **changes}.items() if value is not None}
    return {"8.9": {"forward": {"64": {"half": fields}}}}


def on_device(monkeypatch: pytest.MonkeyPatch, *capabilities: tuple[int, int]) -> Callable[[int], None]:
    """GPUs of these compute capabilities are there; the function sets which one is the current one."""
    current = [0]
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capabilities[device or 0])
    return lambda device: current.__setitem__(0, device)
