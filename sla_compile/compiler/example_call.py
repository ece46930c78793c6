"""The example call that a dry run traces: given as arguments, or caught in a program that calls the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

__all__ = ["Arguments", "example_call"]

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def example_call(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None, call: Callable[[], Any] | None
) -> Arguments:
    """The arguments of an example call of ``model``: ``args`` and ``kwargs``, or those of its first call in ``call()``.

    Raises:
        TypeError: ``args`` is no tuple, ``kwargs`` no mapping, ``call`` no function.
        ValueError: arguments are given beside ``call``, or ``call()`` returns without having called ``model``.
    """
    # A tensor is a sequence of its rows, and would be unpacked into them.
    if not isinstance(args, tuple | list):
        raise TypeError(f"args: got {type(args).__name__}; accepted: a tuple of the positional arguments")
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise TypeError(f"kwargs: got {type(kwargs).__name__}; accepted: a mapping of the keyword arguments")
    if call is None:
        return tuple(args), dict(kwargs or {})
    if not callable(call):
        raise TypeError(f"call: got {type(call).__name__}; accepted: a function without arguments that calls the model")
    if args or kwargs:
        raise ValueError("call: got it beside args or kwargs; accepted: one of them, as either is the example call")
    return _caught(model, call)


class _ModelCalledError(BaseException):
    """Ends ``call()`` where it calls the model; no Exception, which a program might catch."""


def _caught(model: nn.Module, call: Callable[[], Any]) -> Arguments:
    """The arguments of the first call of ``model`` in ``call()``, which ends there: no layer of the model runs."""
    caught: list[Arguments] = []

    def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append((args, kwargs))
        raise _ModelCalledError

    # First of all hooks, and before a forward that offloading replaced: no weight is moved.
    handle = model.register_forward_pre_hook(catch, with_kwargs=True, prepend=True)
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    try:
        # A compiled model would be traced with the hook in it.
        with torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"):
            call()
    except _ModelCalledError:
        pass
    finally:
        handle.remove()
    if not caught:
        name = type(model).__name__
        raise ValueError(
            f"call: returned without a call of this {name}; accepted: a function that calls it, such as "
            f"lambda: pipe('a prompt', num_inference_steps=1)"
        )
    return _plain(model, caught[0])


def _plain(model: nn.Module, arguments: Arguments) -> Arguments:
    """``arguments`` as a trace can have them: not of inference mode, and where the weights are while offloaded."""
    devices = {parameter.device for parameter in model.parameters()}
    device = devices.pop() if len(devices) == 1 else None

    def plain(tensor: torch.Tensor) -> torch.Tensor:
        return (tensor.clone() if tensor.is_inference() else tensor).to(device or tensor.device)

    with torch.inference_mode(False), torch.no_grad():
        result: Arguments = tree_map_only(torch.Tensor, plain, arguments)
    return result
