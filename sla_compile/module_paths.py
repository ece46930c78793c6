"""Module paths as in the plain model, whatever is wrapped around it or around parts of it.

Wrappers are those of ``torch.compile``, of data parallelism, of activation checkpointing, of averages, and of peft.
A wrapper and what is inside it are one module here: they share a path.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

__all__ = ["all_module_paths", "inside", "module_paths"]

NAMES = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""What torch calls a wrapped module, and nobody else calls anything."""

CLASSES = {
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.optim.swa_utils.AveragedModel": "module",
    "peft.peft_model.PeftModel": "base_model",
    "peft.tuners.tuners_utils.BaseTuner": "model",
    "peft.tuners.tuners_utils.BaseTunerLayer": "base_layer",
}
"""Wrappers by their class, and the name of the module inside. By name, so that peft need not be imported."""

COPIES = "peft.utils.other.ModulesToSaveWrapper"
"""peft's wrapper of a module that it trains whole: the module, and a copy for each adapter, one of which is in use."""


def module_paths(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """``model.named_modules()`` without what wrappers put into names, and without copies that are not in use.

    A wrapper and the module it wraps both come with the same path, the wrapper first.
    """
    return ((path, module) for path, module, used in _walk(model) if used)


def all_module_paths(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The same with the copies that are not in use: each has the path of the one that is."""
    return ((path, module) for path, module, _ in _walk(model))


def inside(module: nn.Module) -> nn.Module:
    """``module`` itself, or what it stands for where it is a wrapper."""
    while contents := _contents(module):
        module = module.get_submodule(contents[0])
    return module


def _walk(model: nn.Module) -> Iterator[tuple[str, nn.Module, bool]]:
    """Each module with its path, and whether it is in use."""
    paths = {"": ""}
    used = {"": True}
    for name, module in model.named_modules():
        parent, _, child = name.rpartition(".")
        path = paths.setdefault(name, f"{paths[parent]}.{child}".lstrip("."))
        yield path, module, used.setdefault(name, used[parent])
        for number, content in enumerate(_contents(module)):
            content = f"{name}.{content}".lstrip(".")
            paths[content] = path
            used[content] = used[name] and number == 0


def _contents(module: nn.Module) -> tuple[str, ...]:
    """The name, in a wrapper, of the module that it stands for, then those of copies that are not in use."""
    children = dict(module._modules.items())  # a scripted module has no dict there
    known = {f"{kind.__module__}.{kind.__qualname__}" for kind in type(module).__mro__}
    if COPIES in known:
        return _copies(module)
    for name in (*NAMES, *(CLASSES[kind] for kind in CLASSES if kind in known)):
        if children.get(name) is not None:
            return (name,)
    return ()


def _copies(wrapper: nn.Module) -> tuple[str, ...]:
    """The names of the copies in peft's ``wrapper``, the one in use first, and of what holds those of adapters."""
    copies = wrapper.get_submodule("modules_to_save")
    names = ["original_module", *(f"modules_to_save.{adapter}" for adapter, _ in copies.named_children())]
    disabled, active = getattr(wrapper, "disable_adapters", False), getattr(wrapper, "active_adapters", ())
    used = f"modules_to_save.{active[0]}" if active and not disabled else names[0]
    return (*sorted(names, key=lambda name: name != used), "modules_to_save")
