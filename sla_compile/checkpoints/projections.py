"""``load_projections``: the weights that the SLA authors' code learned, as gates.

Their attention is a module with ``proj_l``, an ``nn.Linear(D, D)`` on the linear branch; a checkpoint has
``proj_l.weight`` (D, D) and ``proj_l.bias`` (D) per attention, which are a gate's weight and bias. Under which path
depends on who wraps the module: ``blocks.0.self_attn.attn_op.local_attn.proj_l`` (thu-ml/TurboDiffusion),
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

from sla_compile.checkpoints.gate_files import not_plain, raise_listed
from sla_compile.common.limits import FLOATING_DTYPES
from sla_compile.gate import Gate, gates

__all__ = ["load_projections"]

PROJECTION = "proj_l"
_ACCEPTED = (
    "a mapping of names to tensors, a .safetensors file or a folder of them, or a file that torch.load opens with "
    "weights_only=True"
)


def load_projections(model: nn.Module, source: str | os.PathLike[str] | Mapping[str, Any]) -> nn.Module:
    """Fill the gates of ``model`` with the ``proj_l`` weights of a checkpoint of the authors' code; returns ``model``.

    Prepare the model first, with ``linear="all"`` (their linear branch sums all key blocks) and shared gates, and
    with the blocks and feature map of that training (TurboDiffusion: ``block_q=128``, ``block_k=64``, softmax,
    ``topk=0.1``). All else in the checkpoint is left alone: load it as any dense checkpoint. Their denominators
    have a constant 1e-5 that ours have not.

    A projection belongs to the gate whose owner it is inside of, by module path. Where that does not fit (other
    names for the same model), projections and gates are paired by the numbers in their paths: ``self_attn`` of
    block 3 with ``attn1`` of block 3, if each has one such attention per block. For any other naming, hand in a
    mapping with the keys renamed to ``<owner's path>.proj_l.weight`` and ``.bias``.

    Args:
        model: a prepared model, compiled or not.
        source: a state dict, or the path of a file or folder that holds one; safetensors, or ``torch.load``'s
            format with ``weights_only=True``. A dictionary with the one in it as ``"state_dict"`` is opened.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no gate, no ``proj_l`` in the source, gates with other settings, or keys and gates that do not
            pair up or fit, each named. The model is then unchanged.
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
    raise_listed(action, [*_unfit_settings(found), *(line for n, g in found.items() for line in not_plain(n, g))])
    projections, problems = _grouped(tensors)
    if not projections and not problems:
        raise ValueError(f"{action}: no key ends in {PROJECTION}.weight; accepted: a checkpoint trained with SLA")
    pairs, unpaired = _paired(sorted(projections, key=_natural), list(found))
    problems += unpaired
    problems += [line for path, gate in pairs.items() for line in _misfits(path, projections[path], found[gate])]
    raise_listed(action, problems)
    with torch.no_grad():
        for path, gate in pairs.items():
            found[gate].weight.copy_(projections[path]["weight"])
            found[gate].bias.copy_(projections[path]["bias"])
            if (scale := found[gate].log_scale) is not None:
                scale.zero_()  # the authors' sparse branch has none
    return model


def _unfit_settings(found: Mapping[str, Gate]) -> Iterable[str]:
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
        raise ValueError(f"load_projections: the folder {name!r} has no .safetensors file; accepted: {_ACCEPTED}")
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
        raise ValueError(f"load_projections: {file!r} cannot be read: {error}; accepted: {_ACCEPTED}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"load_projections: {file!r} holds a {type(content).__name__}; accepted: {_ACCEPTED}")
    return _projections_of(content)


def _projections_of(content: Mapping[str, Any]) -> dict[str, Any]:
    inner = content.get("state_dict")
    if isinstance(inner, Mapping):
        content = inner
    return {key: value for key, value in content.items() if isinstance(key, str) and _is_projection(key)}


def _is_projection(key: str) -> bool:
    return PROJECTION in key.split(".")


def _grouped(tensors: Mapping[str, Any]) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Weight and bias by the path of the module that has them as its ``proj_l``, and what does not fit."""
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
    """Gate by projection; and a line for each of either that has no partner, or more than one."""
    owners = {gate: gate.rpartition(".")[0] for gate in found}
    inside = {p: [g for g in found if p == owners[g] or p.startswith(f"{owners[g]}.".lstrip("."))] for p in projections}
    # The innermost owner: the root of a model holds every path.
    nearest = {p: max(gs, key=lambda g: len(owners[g])) for p, gs in inside.items() if gs}
    if len(nearest) == len(projections) and sorted(nearest.values()) == sorted(found):
        return nearest, []
    here, there = {g: _numbers(owners[g]) for g in found}, {p: _numbers(p) for p in projections}
    ours, theirs = Counter(here.values()), Counter(there.values())
    gate_of = {numbers: gate for gate, numbers in here.items()}
    pairs = {p: gate_of[n] for p, n in there.items() if ours[n] == theirs[n] == 1}
    taken = set(pairs.values())
    lines = [f"{_key(p, 'weight')}: fits no gate of the model, or several" for p in projections if p not in pairs]
    lines += [f"{gate}: no projection fits it, or several" for gate in found if gate not in taken]
    return pairs, lines


def _misfits(path: str, parts: Mapping[str, Tensor], gate: Gate) -> Iterable[str]:
    for part, tensor in parts.items():
        wanted = tuple(getattr(gate, part).shape)
        if tuple(tensor.shape) != wanted:
            yield f"{_key(path, part)}: shape {tuple(tensor.shape)}, its gate {gate.path} needs {wanted}"


def _key(owner: str, part: str) -> str:
    return f"{owner}.{PROJECTION}.{part}".lstrip(".")


def _numbers(path: str) -> tuple[int, ...]:
    return tuple(int(component) for component in path.split(".") if component.isdigit())


def _natural(path: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.split(".")]
