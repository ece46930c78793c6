"""``save`` and ``load``: one safetensors file with every gate, the settings and the sites they were trained for.

What such a file holds is said in ``gate_format``. ``load`` changes nothing in a model before the whole file has been
read and compared with it.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Iterator, Mapping

import torch
from safetensors.torch import save as to_safetensors
from torch import nn

from sla_compile.checkpoints.gate_format import (
    COMPILE_FIELDS,
    SPARSITY,
    GateFile,
    SavedGate,
    metadata_of,
    ordinal_of,
    read_gate_file,
)
from sla_compile.checkpoints.gate_order import arranged
from sla_compile.checkpoints.places import path_text, replace_file
from sla_compile.common.limits import FLOATING_DTYPES
from sla_compile.compat import fully_sharded
from sla_compile.compiler.call_watch import watch
from sla_compile.config import SLAConfig
from sla_compile.config_values import short
from sla_compile.gate import Gate, detach_gate, gates, mark_prepared, model_config, owner_path
from sla_compile.gate_attachment import attach_gate
from sla_compile.module_paths import module_paths
from sla_compile.sharded import fill, is_sharded, on_first_rank, reshard, whole

__all__ = ["load", "raise_problems", "save", "tensor_problems"]

MOST_PROBLEMS = 50
"""Lines in one error."""


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the gates of ``model`` (compiled or not) and its settings to the file ``path``, atomically.

    In a folder it writes ``sla_gates.safetensors``: beside a transformer of diffusers, say, where ``load`` finds it. An
    existing file keeps its mode. How graphs are compiled (``inner``, Inductor's options) is not saved.

    Gates that ``fully_shard`` or a parallel plan made DTensors are gathered: every rank of their mesh has to call this,
    and the first writes the file of a whole model.

    Raises:
        TypeError: ``path`` is no str or path of one.
        ValueError: the model has no gates; gate parameters are flattened (by FullyShardedDataParallel), fake or on
            meta; ``path`` is empty, or a device, pipe or socket; or a setting is too long to be read again.
        OSError: FileNotFoundError if the folder of ``path`` does not exist; others as the system has them.
    """
    name = path_text("save", path)
    found = gates(model)
    config = model_config(model)
    if not found or config is None:
        raise ValueError(
            f"save: {type(model).__name__} has no SLA gates; accepted: a model after sla_compile.prepare, "
            f"or after the first call of torch.compile(model, backend='sla')"
        )
    reshard(model)
    problems = [line for path, gate in found.items() for line in tensor_problems(path, gate)]
    raise_problems(f"save to {name!r}", problems)
    tensors = {
        f"{path}.{part}": whole(tensor.detach()).cpu().contiguous().clone()
        for path, gate in found.items()
        for part, tensor in gate.state_dict().items()
    }
    metadata = metadata_of(config, found)
    parameters = [parameter for gate in found.values() for parameter in gate.parameters()]
    on_first_rank(parameters, lambda: replace_file(name, to_safetensors(tensors, metadata)))


def load(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Load the gates in the file ``path``, or in ``sla_gates.safetensors`` of a folder, into ``model``; returns it.

    A model without gates gets them, with the file's configuration, each on the device and in the dtype of its
    owner's parameters; those of a prepared model are overwritten in place, of DTensors each rank's own part.
    ``requires_grad`` and the random state stay as they are. A file says nothing of how graphs are compiled: old ones
    that do are read without it.

    Raises:
        TypeError: ``path`` is no path: a state dict, say.
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, no gate file, or of another version; something in it is out of bounds (named); the
            model was prepared with other settings (each is named); or gates are missing, extra, of another shape, or
            without an owner in the model (each is named). The model is then unchanged.
    """
    if isinstance(path, Mapping):
        raise TypeError(
            f"load: got a {type(path).__name__} with {len(path)} entries; accepted: the path of a file that "
            f"sla_compile.save wrote. A state dict has gates without their settings: sla_compile.prepare(model, ...) "
            f"as that model was, then model.load_state_dict(...)"
        )
    file = read_gate_file(path)
    if file.left_out:
        names = ", ".join(map(short, file.left_out[:5]))
        warnings.warn(f"load: the file's Inductor options are left out: {names}", stacklevel=2)
    found = gates(model)
    trained = torch.is_grad_enabled()
    reshard(model)
    with torch.no_grad():
        if found:
            file = dataclasses.replace(file, gates=arranged(file.gates, found, os.fspath(path)))
            _check_settings(path, file, model_config(model), found)
            raise_problems(_load_of(path, model), [*file.problems, *_unlike_model(file, found)])
            for name, gate in found.items():
                _fill(gate, file.gates[name])
        else:
            modules = dict(module_paths(model))  # of a wrapper and the module inside, which share a path, the latter
            problems = [*file.problems, *_owner_problems(file, modules)]
            problems += _unsynchronised(model, file, modules) if trained else []
            raise_problems(_load_of(path, model), problems)
            _attach(file, modules)
            mark_prepared(model, file.config)
    watch(model)
    return model


def _differences(theirs: SLAConfig, ours: SLAConfig) -> list[str]:
    """One line for each field, of those that change what a gate learns, that differs between file and model."""
    pairs = [(f.name, getattr(theirs, f.name), getattr(ours, f.name)) for f in dataclasses.fields(SLAConfig)]
    return [
        f"{name} is {short(there)} in the file, {short(here)} in the model"
        for name, there, here in pairs
        if there != here and name not in (*COMPILE_FIELDS, "min_tokens")
    ]


def _check_settings(
    path: str | os.PathLike[str], file: GateFile, config: SLAConfig | None, found: dict[str, Gate]
) -> None:
    differences = _differences(file.config, config) if config is not None else []
    if not differences:
        differences = [
            f"{name}: {line}"
            for name, gate in found.items()
            if name in file.gates
            for line in _differences(file.gates[name].spec.config, gate.config)
        ]
    if differences:
        raise ValueError(
            f"load of {os.fspath(path)!r}: its gates were trained for other settings than the model was "
            f"prepared with: {'; '.join(differences)}; "
            f"accepted: a model prepared with the file's settings, or not prepared"
        )


def _unlike_model(file: GateFile, found: dict[str, Gate]) -> Iterator[str]:
    """Why the file's gates do not fit those of a prepared model, one line each."""
    for name in found:
        if name not in file.gates:
            yield f"{name}: missing in the file"
    for name, saved in file.gates.items():
        if name not in found:
            yield f"{name}: extra in the file, no such gate in the model"
            continue
        yield from tensor_problems(name, found[name])
        for part, tensor in saved.tensors.items():
            here = tuple(getattr(found[name], part).shape)
            if here != tuple(tensor.shape):
                yield f"{name}.{part}: shape {tuple(tensor.shape)} in the file, {here} in the model"


def tensor_problems(name: str, gate: Gate) -> Iterator[str]:
    """Why parameters of ``gate``, called ``name``, cannot be read or written (sharded, fake, meta), one line each."""
    parameters = dict(gate.named_parameters())
    for part, shape in gate.spec().shapes().items():
        if part == SPARSITY:
            continue
        parameter = parameters.get(part)
        if parameter is None or (parameter.dim() == 1 and tuple(parameter.shape) != shape):
            held = "not among its parameters" if parameter is None else f"of shape {tuple(parameter.shape)}"
            yield (
                f"{name}.{part}: {held}, so flattened over ranks; accepted: shape {shape}, as by fully_shard, or "
                f"within FullyShardedDataParallel.summon_full_params(model)"
            )
        elif type(parameter) not in (torch.Tensor, nn.Parameter) and not is_sharded(parameter):
            yield f"{name}.{part}: a {type(parameter).__name__}; accepted: a plain tensor or a DTensor"
        elif parameter.is_meta:
            yield f"{name}.{part}: on the meta device; accepted: a tensor with values"


def raise_problems(action: str, problems: list[str]) -> None:
    """Raise one ValueError that lists ``problems``, if there are any."""
    if problems:
        shown = problems[:MOST_PROBLEMS]
        more = [f"and {len(problems) - len(shown)} more"] if len(problems) > len(shown) else []
        lines = "\n  ".join([*shown, *more])
        raise ValueError(f"{action}: {len(problems)} problem(s), nothing was changed:\n  {lines}")


def _load_of(path: str | os.PathLike[str], model: nn.Module) -> str:
    return f"load of {os.fspath(path)!r} into {type(model).__name__}"


def _owner_problems(file: GateFile, modules: dict[str, nn.Module]) -> Iterator[str]:
    """Why the file's gates cannot be put into a model that has none, one line each."""
    for name in file.gates:
        path, _, child = name.rpartition(".")
        owner = modules.get(path)
        if ordinal_of(name) is None:
            yield f"{name}: no gate path; accepted: its owner's path, then sla, sla_1, ..."
        elif owner is None:
            yield f"{name}: no module {path!r} in the model"
        elif hasattr(owner, child):
            yield f"{name}: the module has another attribute {child!r} already"
        elif _device_and_dtype(modules, path)[0].type == "meta":
            yield f"{name}: its owner is on the meta device; accepted: an owner with values"


def _unsynchronised(model: nn.Module, file: GateFile, modules: dict[str, nn.Module]) -> Iterator[str]:
    """Why gates made now would be trained by each process on its own, one line each."""
    replicas = [outer for outer in model.modules() if isinstance(outer, nn.parallel.DistributedDataParallel)]
    replicated = {inner for outer in replicas for inner in outer.modules()}
    for name in file.gates:
        owner = modules.get(owner_path(name))
        if owner is not None and (owner in replicated or fully_sharded(owner)):
            wrapper = "DistributedDataParallel" if owner in replicated else "fully_shard"
            yield f"{name}: its owner is in {wrapper} already; accepted: load first, {wrapper} after it"


def _attach(file: GateFile, modules: dict[str, nn.Module]) -> None:
    """Inject the file's gates and fill them; if one fails, all are removed again."""
    attached: list[tuple[nn.Module, int]] = []
    try:
        for name, saved in file.gates.items():
            owner = modules[owner_path(name)]
            device, dtype = _device_and_dtype(modules, owner_path(name))
            attached.append((owner, saved.spec.ordinal))
            gate = attach_gate(owner, saved.spec, device=device, dtype=dtype or saved.dtype)
            _fill(gate, saved)
    except BaseException:
        for owner, ordinal in attached:
            detach_gate(owner, ordinal)
        raise


def _fill(gate: Gate, saved: SavedGate) -> None:
    for part, tensor in saved.tensors.items():
        fill(getattr(gate, part), tensor)


def _device_and_dtype(modules: dict[str, nn.Module], path: str) -> tuple[torch.device, torch.dtype | None]:
    """Device and dtype of the first floating parameter at ``path``, or in the nearest module around it that has any."""
    while True:
        for parameter in modules[path].parameters():
            if parameter.dtype in FLOATING_DTYPES:
                return parameter.device, parameter.dtype
        if not path:
            return torch.device("cpu"), None
        path = path.rpartition(".")[0]
