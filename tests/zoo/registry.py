"""Tiny random examples of diffusers' transformer classes: one function each, found by the name of the class.

An example is the configuration of the model and one call. The self-attention of each sees about 64 to 300 tokens with a
head dimension of at least 16, so that blocks of 16 give it more than a few rows.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

__all__ = ["EXAMPLES", "Parts", "build", "call", "example", "grid", "padded", "randn", "transformer_classes"]

Parts = tuple[dict[str, Any], dict[str, Any]]
"""The configuration of a model, and the keyword arguments of one call."""

EXAMPLES: dict[str, Callable[[], Parts]] = {}
randn = torch.randn


def example(name: str) -> Callable[[Callable[[], Parts]], Callable[[], Parts]]:
    """Register a function as the example of the diffusers class ``name``."""

    def register(parts: Callable[[], Parts]) -> Callable[[], Parts]:
        EXAMPLES[name] = parts
        return parts

    return register


def grid(*sizes: int) -> torch.Tensor:
    """Coordinates of a grid in row-major order, (product of sizes, number of sizes) float32."""
    axes = torch.meshgrid(*(torch.arange(size, dtype=torch.float32) for size in sizes), indexing="ij")
    return torch.stack([axis.flatten() for axis in axes], dim=-1)


def padded(tokens: int, missing: int = 3, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A mask (1, tokens) whose last ``missing`` tokens are padding: 1 or True elsewhere."""
    return (torch.arange(tokens) < tokens - missing)[None].to(dtype)


def build(name: str, seed: int = 0) -> tuple[nn.Module, dict[str, Any]]:
    """The model and the inputs of the example ``name``.

    Parameters that diffusers makes zero (the last projection, some gates) become random: the output and the gradients
    would be zero with them, and any comparison of them void. Dropout is off.
    """
    torch.manual_seed(seed)
    config, inputs = EXAMPLES[name]()
    model: nn.Module = transformer_classes()[name](**config)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any() or not parameter.isfinite().all():
                parameter.normal_(std=0.2)
    return model.eval(), inputs


def call(model: Callable[..., Any], inputs: dict[str, Any]) -> torch.Tensor:
    """Every tensor that ``model(**inputs)`` returns, in one flat float tensor."""
    found: list[torch.Tensor] = []

    def collect(value: Any) -> None:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            found.append(value.flatten())
        elif isinstance(value, dict):
            for item in value.values():
                collect(item)
        elif isinstance(value, list | tuple):
            for item in value:
                collect(item)

    collect(model(**inputs))
    return torch.cat(found)


def transformer_classes() -> dict[str, type[nn.Module]]:
    """Every model class of ``diffusers.models.transformers``, by name."""
    package = importlib.import_module("diffusers.models.transformers")
    base = importlib.import_module("diffusers.models.modeling_utils").ModelMixin
    found: dict[str, type[nn.Module]] = {}
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        for name, value in vars(module).items():
            if isinstance(value, type) and issubclass(value, base) and value.__module__ == module.__name__:
                found[name] = value
    return found


for _family in ("wan", "video", "image", "flux", "others", "rare"):
    importlib.import_module(f"tests.zoo.{_family}")
