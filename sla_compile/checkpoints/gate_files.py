"""``save`` and ``load``: one safetensors file with every gate, the settings and the sites they were trained for.

Tensors: ``<gate path>.weight`` and ``<gate path>.bias``; where the settings have ``sparse_scale`` also
``<gate path>.log_scale``, and where they have ``max_topk`` also ``<gate path>.sparsity``.
Metadata: ``format``, ``version``, ``config`` (JSON of the model's ``SLAConfig``) and ``sites`` (JSON list with path,
heads, head_dim, settings and any token grids of each gate).

``load`` changes nothing in a model before the whole file has been read and compared with it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import uuid
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import nn

from sla_compile.common.blocks import MILLION
from sla_compile.common.limits import FLOATING_DTYPES
from sla_compile.config import SITE_FIELDS, SITE_FIELDS_FILES_MAY_LACK, SLAConfig
from sla_compile.gate import Gate, attach_gate, detach_gate, gates, mark_prepared, model_config, owner_path
from sla_compile.gate_settings import CALLED, NO_GRIDS, GateSpec, grids_from_json, grids_to_json
from sla_compile.module_paths import module_paths

__all__ = ["GateFile", "SavedGate", "load", "raise_problems", "read_gate_file", "save", "tensor_problems"]

FORMAT, VERSION = "sla_compile", "1"
COMPILE_FIELDS = ("inner", "inductor")
"""Settings that may differ between file and model: how a graph is compiled changes nothing that a gate learns."""
SPARSITY = "sparsity"


@dataclass(frozen=True)
class SavedGate:
    """One gate of a file: what its site asked of it, and its parameters and buffers by name, on the CPU."""

    spec: GateSpec
    tensors: dict[str, torch.Tensor]

    def settings(self) -> dict[str, Any]:
        """The fields of ``SITE_FIELDS``; topk and bottomk as they were last set."""
        settings = {name: getattr(self.spec.config, name) for name in SITE_FIELDS}
        if SPARSITY in self.tensors:
            settings["topk"], settings["bottomk"] = (share / MILLION for share in self.tensors[SPARSITY].tolist())
        return settings


@dataclass(frozen=True)
class GateFile:
    """The content of a gate file."""

    config: SLAConfig
    """Settings of the whole model that was saved."""
    gates: dict[str, SavedGate]
    """By the module path of the gate."""
    problems: list[str]
    """One line for each tensor that does not fit the file's own list of sites."""


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the gates of ``model`` (compiled or not) and its configuration to ``path``, atomically.

    Raises ValueError if the model has no gates, or gate parameters are sharded, fake or on meta; FileNotFoundError if
    the folder of ``path`` does not exist.
    """
    found = gates(model)
    config = model_config(model)
    if not found or config is None:
        raise ValueError(
            f"save: {type(model).__name__} has no SLA gates; accepted: a model after sla_compile.prepare, "
            f"or after the first call of torch.compile(model, backend='sla')"
        )
    problems = [line for name, gate in found.items() for line in tensor_problems(name, gate)]
    raise_problems(f"save to {os.fspath(path)!r}", problems)
    tensors, sites = {}, []
    for name, gate in found.items():
        for part, tensor in gate.state_dict().items():
            tensors[f"{name}.{part}"] = tensor.detach().cpu().contiguous().clone()
        settings = {field: getattr(gate.config, field) for field in SITE_FIELDS}
        site = {"path": name, "heads": gate.heads, "head_dim": gate.head_dim, "config": settings}
        seen = {"seen": grids_to_json(gate.seen)} if any(gate.seen) else {}
        sites.append(site | seen | ({"pattern": gate.pattern} if gate.pattern != CALLED else {}))
    metadata = {"format": FORMAT, "version": VERSION, "config": config.to_json(), "sites": json.dumps(sites)}
    _write(path, to_safetensors(tensors, metadata))


def load(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Load the gates in ``path`` into ``model`` and return it.

    A model without gates gets them, with the file's configuration, each on the device and in the dtype of its
    owner's parameters; those of a prepared model are overwritten in place. ``requires_grad`` and the random state stay
    as they are.

    Raises FileNotFoundError if there is no such file; ValueError if it is truncated, no gate file, or of another
    version; if the model was prepared with other settings (each is named); or if gates are missing, extra, of another
    shape, or without an owner in the model (each is named). The model is then unchanged.
    """
    file = read_gate_file(path)
    found = gates(model)
    with torch.no_grad():
        if found:
            _check_settings(path, file, model_config(model), found)
            raise_problems(_load_of(path, model), [*file.problems, *_unlike_model(file, found)])
            for name, gate in found.items():
                _fill(gate, file.gates[name])
        else:
            modules = dict(module_paths(model))  # of a wrapper and the module inside, which share a path, the latter
            raise_problems(_load_of(path, model), [*file.problems, *_owner_problems(file, modules)])
            _attach(file, modules)
            mark_prepared(model, file.config)
    return model


def _write(path: str | os.PathLike[str], content: bytes) -> None:
    """Replace ``path`` (or what it links to) in one step: a crash leaves the old file or the new one."""
    target = os.path.realpath(path)
    folder, name = os.path.split(target)
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"save to {os.fspath(path)!r}: there is no folder {folder!r}")
    temporary = os.path.join(folder, f".{name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, target)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise


def read_gate_file(path: str | os.PathLike[str]) -> GateFile:
    """The content of a gate file; ValueError with ``path`` and what was found if it is none, or not a whole one."""
    name = os.fspath(path)
    if not os.path.exists(name):
        raise FileNotFoundError(f"load: no file {name!r}")
    if not os.path.isfile(name):
        raise ValueError(f"load: {name!r} is no file; accepted: a file that sla_compile.save wrote")
    try:
        with safe_open(name, framework="pt", device="cpu") as opened:
            metadata = opened.metadata() or {}
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        size = os.path.getsize(name)
        raise ValueError(
            f"load: {name!r} ({size} bytes) is truncated or no safetensors file: {error}; "
            f"accepted: a file that sla_compile.save wrote"
        ) from error
    if metadata.get("format") != FORMAT:
        shown = ", ".join(sorted(tensors)[:3]) or "none"
        raise ValueError(
            f"load: {name!r} is a safetensors file of something else: metadata {metadata!r}, "
            f"tensors {shown}, ...; accepted: metadata with format {FORMAT!r}, as sla_compile.save writes"
        )
    if metadata.get("version") != VERSION:
        raise ValueError(f"load: {name!r} has version {metadata.get('version')!r}; accepted: version {VERSION!r}")
    try:
        return _parse(metadata, tensors)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"load: {name!r} has metadata that cannot be read: {_message(error)}") from error


def _parse(metadata: dict[str, str], tensors: dict[str, torch.Tensor]) -> GateFile:
    """Raises KeyError, TypeError or ValueError where the metadata is not what ``save`` writes."""
    config = _config_of(json.loads(metadata["config"]))
    gates: dict[str, SavedGate] = {}
    problems: list[str] = []
    left = dict(tensors)
    for entry in json.loads(metadata["sites"]):
        path, heads, head_dim = entry["path"], entry["heads"], entry["head_dim"]
        if type(path) is not str or type(heads) is not int or type(head_dim) is not int:
            raise ValueError(f"site {entry!r}; accepted: a path with integer heads and head_dim")
        given = {**{field: getattr(SLAConfig(), field) for field in SITE_FIELDS_FILES_MAY_LACK}, **entry["config"]}
        settings = {field: given[field] for field in SITE_FIELDS}
        spec = GateSpec(
            heads=heads,
            head_dim=head_dim,
            config=dataclasses.replace(config, overrides={}, **settings),
            model_config=config,
            path=path,
            ordinal=_ordinal(path) or 0,
            seen=grids_from_json(entry.get("seen", NO_GRIDS)),
            pattern=str(entry.get("pattern", CALLED)),
        )
        gates[path] = SavedGate(spec, {})
        for part, shape in spec.shapes().items():
            tensor = left.pop(f"{path}.{part}", None)
            if tensor is None:
                problems.append(f"{path}.{part}: missing in the file")
            elif tuple(tensor.shape) != shape:
                problems.append(f"{path}.{part}: shape {tuple(tensor.shape)} in the file, its site needs {shape}")
            elif tensor.dtype not in ((torch.int64,) if part == SPARSITY else FLOATING_DTYPES):
                accepted = "torch.int64" if part == SPARSITY else "a floating dtype"
                problems.append(f"{path}.{part}: {tensor.dtype} in the file; accepted: {accepted}")
            else:
                gates[path].tensors[part] = tensor
    if not gates:
        raise ValueError("no site in the list of sites")
    problems += [f"{name}: extra in the file, of no site in its list" for name in sorted(left)]
    return GateFile(config, gates, problems)


def _config_of(data: dict[str, Any]) -> SLAConfig:
    """The model's settings; Inductor options that this torch refuses are left out, with a warning."""
    try:
        return SLAConfig.from_dict(data)
    except ValueError as error:
        if not (isinstance(data, dict) and data.get("inductor")):
            raise
        config = SLAConfig.from_dict({**data, "inductor": {}})
        warnings.warn(f"load: the file's Inductor options are left out: {error}", stacklevel=5)  # at the call of load
        return config


def _message(error: Exception) -> str:
    return f"no entry {error}" if isinstance(error, KeyError) else str(error)


def _differences(theirs: SLAConfig, ours: SLAConfig) -> list[str]:
    """One line for each field, of those that change what a gate learns, that differs between file and model."""
    pairs = [(f.name, getattr(theirs, f.name), getattr(ours, f.name)) for f in dataclasses.fields(SLAConfig)]
    return [
        f"{name} is {there!r} in the file, {here!r} in the model"
        for name, there, here in pairs
        if there != here and name not in COMPILE_FIELDS
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
    for part, parameter in gate.named_parameters():
        if type(parameter) not in (torch.Tensor, nn.Parameter):
            kind = type(parameter).__name__
            yield f"{name}.{part}: a {kind}; accepted: a plain tensor, gathered before (full_tensor)"
        elif parameter.is_meta:
            yield f"{name}.{part}: on the meta device; accepted: a tensor with values"


def raise_problems(action: str, problems: list[str]) -> None:
    """Raise one ValueError that lists all ``problems``, if there are any."""
    if problems:
        raise ValueError(f"{action}: {len(problems)} problem(s), nothing was changed:\n  " + "\n  ".join(problems))


def _load_of(path: str | os.PathLike[str], model: nn.Module) -> str:
    return f"load of {os.fspath(path)!r} into {type(model).__name__}"


def _ordinal(gate_path: str) -> int | None:
    """The reverse of `gate_name`: which attention of its owner the gate at this path belongs to; None for no gate."""
    name = re.fullmatch(r"sla(?:_([1-9]\d*))?", gate_path.rpartition(".")[2])
    return None if name is None else int(name[1] or 0)


def _owner_problems(file: GateFile, modules: dict[str, nn.Module]) -> Iterator[str]:
    """Why the file's gates cannot be put into a model that has none, one line each."""
    for name in file.gates:
        path, _, child = name.rpartition(".")
        owner = modules.get(path)
        if _ordinal(name) is None:
            yield f"{name}: no gate path; accepted: its owner's path, then sla, sla_1, ..."
        elif owner is None:
            yield f"{name}: no module {path!r} in the model"
        elif hasattr(owner, child):
            yield f"{name}: the module has another attribute {child!r} already"
        elif _device_and_dtype(modules, path)[0].type == "meta":
            yield f"{name}: its owner is on the meta device; accepted: an owner with values"


def _attach(file: GateFile, modules: dict[str, nn.Module]) -> None:
    """Inject the file's gates and fill them; if one fails, all are removed again."""
    attached: list[tuple[nn.Module, int]] = []
    try:
        for name, saved in file.gates.items():
            owner = modules[owner_path(name)]
            device, dtype = _device_and_dtype(modules, owner_path(name))
            attached.append((owner, saved.spec.ordinal))
            gate = attach_gate(owner, saved.spec, device=device, dtype=dtype or saved.tensors["weight"].dtype)
            _fill(gate, saved)
    except BaseException:
        for owner, ordinal in attached:
            detach_gate(owner, ordinal)
        raise


def _fill(gate: Gate, saved: SavedGate) -> None:
    for part, tensor in saved.tensors.items():
        getattr(gate, part).copy_(tensor)


def _device_and_dtype(modules: dict[str, nn.Module], path: str) -> tuple[torch.device, torch.dtype | None]:
    """Device and dtype of the first floating parameter at ``path``, or in the nearest module around it that has any."""
    while True:
        for parameter in modules[path].parameters():
            if parameter.dtype in FLOATING_DTYPES:
                return parameter.device, parameter.dtype
        if not path:
            return torch.device("cpu"), None
        path = path.rpartition(".")[0]
