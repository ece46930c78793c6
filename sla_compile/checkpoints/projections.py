"""``load_projections``: a checkpoint of the SLA authors' code into gates.

Their attention is a module with ``proj_l``, an ``nn.Linear(D, D)`` on the linear branch. So a checkpoint has
``proj_l.weight`` (D, D) and ``proj_l.bias`` (D) for each attention, which are a gate's weight and bias. Their paths
depend on which code wraps that module: ``blocks.0.self_attn.attn_op.local_attn.proj_l`` (thu-ml/TurboDiffusion),
``blocks.0.attn1.attn_impl.proj_l`` (FastVideo), anything that ends so for thu-ml/SLA's own module.
"""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sla_compile.checkpoints.gate_files import raise_problems, tensor_problems
from sla_compile.common.limits import FLOATING_DTYPES
from sla_compile.gate import Gate, gates, owner_path
from sla_compile.sharded import fill

__all__ = ["load_projections"]

PROJECTION = "proj_l"
_ACCEPTED_SOURCES = (
    "a mapping of names to tensors, a .safetensors file or a folder of them, or a file that torch.load opens with "
    "weights_only=True"
)


def load_projections(model: nn.Module, source: str | os.PathLike[str] | Mapping[str, Any]) -> nn.Module:
    """Fill the gates of ``model`` with the ``proj_l`` weights of a checkpoint of the authors' code; returns ``model``.

    Prepare the model first, with ``linear="all"`` (their linear branch sums all key blocks) and shared gates, and
    with the block sizes and feature map of that training (TurboDiffusion: ``block_q=128``, ``block_k=64``, softmax,
    ``topk=0.1``). The rest of the checkpoint is not read: load it as any dense one. Their denominators
    have a constant 1e-5 that ours have not.

    A projection goes to the gate whose owner contains it, by module path. Where not every one is contained so (other
    names for the same model), projections and gates are paired by the numbers in their paths: ``self_attn`` of
    block 3 with ``attn1`` of block 3, if each has one such attention per block. For any other naming, pass a mapping
    with the keys renamed to ``<owner's path>.proj_l.weight`` and ``.bias``.

    Args:
        model: a prepared model, compiled or not.
        source: a state dict, or the path of a file or folder that holds one; safetensors, or ``torch.load``'s
            format with ``weights_only=True``. A dictionary with the one in it as ``"state_dict"`` is opened.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the model has no gates, or gates with other settings; the source has no ``proj_l``; or keys and
            gates do not pair up or differ in shape (each is named). The model is then unchanged.
    """
    found = gates(model)
    if not found:
        raise ValueError(
            f"load_projections: {type(model).__name__} has no SLA gates; accepted: a model after "
            f"sla_compile.prepare(model, ..., config={{'linear': 'all'}})"
        )
    tensors = _read(source)
    where = "a mapping" if isinstance(source, Mapping) else repr(os.fspath(source))
    action = f"load_projections from {where} into {type(model).__name__}"
    raise_problems(
        action, [*_settings_problems(found), *(line for n, g in found.items() for line in tensor_problems(n, g))]
    )
    projections, problems = _grouped(tensors)
    if not projections and not problems:
        raise ValueError(f"{action}: no key ends in {PROJECTION}.weight; accepted: a checkpoint trained with SLA")
    pairs, unpaired = _paired(sorted(projections, key=_natural_order), list(found))
    problems += unpaired
    problems += [line for path, gate in pairs.items() for line in _shape_problems(path, projections[path], found[gate])]
    raise_problems(action, problems)
    with torch.no_grad():
        for path, gate in pairs.items():
            fill(found[gate].weight, projections[path]["weight"])
            fill(found[gate].bias, projections[path]["bias"])
            if (scale := found[gate].log_scale) is not None:
                scale.zero_()  # the authors' sparse branch has none
    return model


def _settings_problems(found: Mapping[str, Gate]) -> Iterable[str]:
    for path, gate in found.items():
        for name, wanted in (("linear", "all"), ("gate", "shared")):
            if (value := getattr(gate.config, name)) != wanted:
                yield f"{path}: prepared with {name}={value!r}; accepted: {name}={wanted!r}"


def _read(source: str | os.PathLike[str] | Mapping[str, Any]) -> dict[str, Any]:
    """The entries of ``source`` that belong to a projection."""
    if isinstance(source, Mapping):
        return _projections_of(source)
    name = os.fspath(source)
    if not os.path.exists(name):
        raise FileNotFoundError(f"load_projections: no file {name!r}")
    files = sorted(glob.glob(os.path.join(glob.escape(name), "*.safetensors"))) if os.path.isdir(name) else [name]
    if not files:
        raise ValueError(
            f"load_projections: the folder {name!r} has no .safetensors file; accepted: {_ACCEPTED_SOURCES}"
        )
    entries: dict[str, Any] = {}
    for file in files:
        entries.update(_read_safetensors(file) if Path(file).suffix == ".safetensors" else _read_pickle(file))
    return entries


def _read_safetensors(file: str) -> dict[str, Any]:
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys() if _is_projection(key)}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"load_projections: {file!r} is no safetensors file: {error}") from error


def _read_pickle(file: str) -> dict[str, Any]:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load documents none of what it raises on foreign files
        raise ValueError(
            f"load_projections: {file!r} cannot be read: {error}; accepted: {_ACCEPTED_SOURCES}"
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(f"load_projections: {file!r} holds a {type(content).__name__}; accepted: {_ACCEPTED_SOURCES}")
    return _projections_of(content)


def _projections_of(content: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a state dict, or of the one inside as ``"state_dict"``, that belong to a projection."""
    inner = content.get("state_dict")
    if isinstance(inner, Mapping):
        content = inner
    return {key: value for key, value in content.items() if isinstance(key, str) and _is_projection(key)}


def _is_projection(key: str) -> bool:
    return PROJECTION in key.split(".")


def _grouped(tensors: Mapping[str, Any]) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Weight and bias by the path of the module whose ``proj_l`` they are; a line for each key that fits nowhere."""
    groups: dict[str, dict[str, Tensor]] = {}
    problems = []
    for key, value in tensors.items():
        path, _, part = key.rpartition(".")
        owner, _, last = path.rpartition(".")
        if last != PROJECTION or part not in ("weight", "bias"):
            problems.append(f"{key}: not the weight or the bias of a {PROJECTION}")
        elif not isinstance(value, Tensor) or value.dtype not in FLOATING_DTYPES:
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            problems.append(f"{key}: {kind}; accepted: a tensor of a floating dtype")
        else:
            groups.setdefault(owner, {})[part] = value
    for owner in groups:
        keys = [_key(owner, part) for part in ("weight", "bias")]
        problems += [f"{key}: missing" for key in keys if key not in tensors]
    return groups, problems


def _paired(projections: list[str], found: list[str]) -> tuple[dict[str, str], list[str]]:
    """Path of the gate by path of the projection; and a line for each of either without exactly one partner."""
    owners = {gate: owner_path(gate) for gate in found}
    containing = {
        p: [g for g in found if p == owners[g] or p.startswith(f"{owners[g]}.".lstrip("."))] for p in projections
    }
    # The innermost owner: the root of a model contains every path.
    by_owner = {p: max(gs, key=lambda g: len(owners[g])) for p, gs in containing.items() if gs}
    if len(by_owner) == len(projections) and sorted(by_owner.values()) == sorted(found):
        return by_owner, []
    gate_numbers, projection_numbers = {g: _numbers(owners[g]) for g in found}, {p: _numbers(p) for p in projections}
    gates_with, projections_with = Counter(gate_numbers.values()), Counter(projection_numbers.values())
    gate_of = {numbers: gate for gate, numbers in gate_numbers.items()}
    pairs = {p: gate_of[n] for p, n in projection_numbers.items() if gates_with[n] == projections_with[n] == 1}
    taken = set(pairs.values())
    lines = [f"{_key(p, 'weight')}: fits no gate of the model, or several" for p in projections if p not in pairs]
    lines += [f"{gate}: no projection fits it, or several" for gate in found if gate not in taken]
    return pairs, lines


def _shape_problems(path: str, parts: Mapping[str, Tensor], gate: Gate) -> Iterable[str]:
    for part, tensor in parts.items():
        wanted = tuple(getattr(gate, part).shape)
        if tuple(tensor.shape) != wanted:
            yield f"{_key(path, part)}: shape {tuple(tensor.shape)}, its gate {gate.path} needs {wanted}"


def _key(owner: str, part: str) -> str:
    return f"{owner}.{PROJECTION}.{part}".lstrip(".")


def _numbers(path: str) -> tuple[int, ...]:
    """The components of ``path`` that are numbers: those of the blocks, in most models."""
    return tuple(int(component) for component in path.split(".") if component.isdigit())


def _natural_order(path: str) -> list[tuple[int, str]]:
    """Sorting key by which block 10 comes after block 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.split(".")]
