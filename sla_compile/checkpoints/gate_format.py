"""What a file of gates holds, and reading it as something that anybody may have written.

A safetensors file. Tensors: ``<gate path>.weight`` and ``<gate path>.bias``, where the settings have ``sparse_scale``
also ``<gate path>.log_scale``, and with ``linear="taylor"`` ``<gate path>.shift`` instead; where they have ``max_topk``
also ``<gate path>.sparsity``.
Metadata: ``format``, ``version``, ``config`` (JSON of the model's ``SLAConfig``) and ``sites`` (JSON list with path,
heads, head_dim, settings and any token grids of each gate).

A file describes gates. It configures no compiler: `COMPILE_FIELDS` are neither written nor read. Everything in it is
bounded and checked before it is used, and no tensor is read before its site says that it should be there.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from sla_compile.checkpoints.bounded_json import read_json
from sla_compile.checkpoints.places import file_to_read, is_gate_tensor
from sla_compile.common.blocks import MILLION
from sla_compile.common.limits import FLOATING_DTYPES
from sla_compile.config import SITE_FIELDS, SITE_FIELDS_FILES_MAY_LACK, SLAConfig
from sla_compile.config_values import short, value_error
from sla_compile.gate import Gate
from sla_compile.gate_settings import NO_GRIDS, GateSpec, SeenGrids, grids_from_json, grids_to_json

__all__ = ["COMPILE_FIELDS", "SPARSITY", "GateFile", "SavedGate", "metadata_of", "ordinal_of", "read_gate_file"]

FORMAT, VERSION = "sla_compile", "1"
COMPILE_FIELDS = ("inner", "inductor")
"""Settings of no gate: how a graph is compiled. Files of before have them; they are left out."""
SPARSITY = "sparsity"
LARGEST_SIZE = 2**16
"""Of heads, and of a head dimension."""


@dataclass(frozen=True)
class SavedGate:
    """One gate of a file: what its site asked of it, and its parameters and buffers by name, on the CPU."""

    spec: GateSpec
    tensors: dict[str, torch.Tensor]

    @property
    def dtype(self) -> torch.dtype:
        """That of its parameters."""
        return next(tensor.dtype for tensor in self.tensors.values() if tensor.is_floating_point())

    def settings(self) -> dict[str, Any]:
        """The fields of ``SITE_FIELDS``; topk and bottomk as they were last set, of heads with their own the mean."""
        settings = {name: getattr(self.spec.config, name) for name in SITE_FIELDS}
        if SPARSITY in self.tensors:
            shares = self.tensors[SPARSITY].view(-1, 2).double().mean(dim=0)
            settings["topk"], settings["bottomk"] = (share / MILLION for share in shares.tolist())
        return settings


@dataclass(frozen=True)
class GateFile:
    """The content of a gate file."""

    config: SLAConfig
    """Settings of the whole model that was saved, `COMPILE_FIELDS` at their defaults."""
    gates: dict[str, SavedGate]
    """By the module path of the gate."""
    problems: list[str]
    """One line for each tensor that does not fit the file's own list of sites."""
    left_out: tuple[str, ...] = ()
    """Names of Inductor options in the file, which are not obeyed."""


def metadata_of(config: SLAConfig, found: Mapping[str, Gate]) -> dict[str, str]:
    """The metadata of a file with the gates ``found``; ValueError where it could not be read again."""
    sites = []
    for name, gate in found.items():
        settings = {field: getattr(gate.config, field) for field in SITE_FIELDS}
        site = {"path": name, "heads": gate.heads, "head_dim": gate.head_dim, "config": settings}
        seen = {"seen": grids_to_json(gate.seen)} if any(gate.seen) else {}
        sites.append(site | seen | ({"call_site": gate.call_site} if gate.call_site else {}))
    fields = {name: value for name, value in config.to_dict().items() if name not in COMPILE_FIELDS}
    texts = {"config": json.dumps(fields), "sites": json.dumps(sites)}
    for name, text in texts.items():
        read_json(name, text)
    return {"format": FORMAT, "version": VERSION, **texts}


def read_gate_file(path: str | os.PathLike[str]) -> GateFile:
    """The content of a gate file, which may be in the folder ``path``.

    FileNotFoundError where there is none; ValueError with ``path`` and what was found if it is no whole gate file.
    """
    name = file_to_read(path)
    try:
        with safe_open(name, framework="pt", device="cpu") as opened:
            metadata = opened.metadata() or {}
            _check_format(name, metadata, sorted(opened.keys()))
            try:
                return _parse(metadata, opened)
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"load: {name!r} has metadata that cannot be read: {_message(error)}") from error
    except SafetensorError as error:
        size = os.path.getsize(name)
        raise ValueError(
            f"load: {name!r} ({size} bytes) is truncated or no safetensors file: {error}; "
            f"accepted: a file that sla_compile.save wrote"
        ) from error


def _check_format(name: str, metadata: Mapping[str, str], tensors: list[str]) -> None:
    if metadata.get("format") != FORMAT:
        if gate_tensors := [tensor for tensor in tensors if is_gate_tensor(tensor)]:
            raise ValueError(
                f"load: {name!r} holds the state dict of a model, with gates (first: {_shown(gate_tensors[0])}) but "
                f"not their settings; accepted: a file that sla_compile.save wrote, or for a state dict "
                f"sla_compile.prepare(model, ...) as that model was, then model.load_state_dict(...)"
            )
        shown = ", ".join(map(_shown, tensors[:3])) or "none"
        raise ValueError(
            f"load: {name!r} is a safetensors file of something else: metadata {short(dict(metadata))}, "
            f"tensors {shown}, ...; accepted: metadata with format {FORMAT!r}, as sla_compile.save writes"
        )
    if metadata.get("version") != VERSION:
        version = short(metadata.get("version"))
        raise ValueError(f"load: {name!r} has version {version}; accepted: version {VERSION!r}")


def _parse(metadata: Mapping[str, str], opened: Any) -> GateFile:
    """Raises KeyError, TypeError or ValueError where the metadata is not what ``save`` writes."""
    fields, entries = (read_json(name, metadata[name]) for name in ("config", "sites"))
    if type(entries) is not list or not entries:
        raise value_error("sites", entries, "a list of at least one site")
    left_out: tuple[str, ...] = ()
    if isinstance(fields, dict):
        left_out = tuple(map(str, fields.get("inductor") or ()))
        fields = {name: value for name, value in fields.items() if name not in COMPILE_FIELDS}
        fields = {"linear": "marginal", **fields}  # its default until files could have another
    config = SLAConfig.from_dict(fields)
    left = set(opened.keys())
    gates: dict[str, SavedGate] = {}
    problems: list[str] = []
    for position, entry in enumerate(entries):
        spec = _spec(f"sites[{position}]", entry, config)
        if spec.path in gates:
            raise ValueError(f"sites[{position}]: got {short(spec.path)} again; accepted: each gate once")
        gates[spec.path] = SavedGate(spec, {})
        for part, shape in spec.shapes().items():
            name = f"{spec.path}.{part}"
            problem = "missing in the file"
            if name in left:
                left.remove(name)
                tensor = _tensor(opened, name, shape)
                problem = tensor if isinstance(tensor, str) else _value_problem(part, tensor)
                if not isinstance(tensor, str):
                    gates[spec.path].tensors[part] = tensor
            if problem:
                problems.append(f"{name}: {problem}")
    problems += [f"{_shown(name)}: extra in the file, of no site in its list" for name in sorted(left)]
    return GateFile(config, gates, problems, left_out)


def _spec(where: str, entry: Any, config: SLAConfig) -> GateSpec:
    """What the site ``entry`` of a file asks of its gate; ``where`` names it in errors."""
    if type(entry) is not dict:
        raise value_error(where, entry, "a mapping with path, heads, head_dim and config")
    path = entry["path"]
    if type(path) is not str:
        raise value_error(f"{where}: path", path, "the module path of a gate")
    where = f"{where}, {short(path)}"
    for name in ("heads", "head_dim"):
        if type(entry[name]) is not int or not 1 <= entry[name] <= LARGEST_SIZE:
            raise value_error(f"{where}: {name}", entry[name], f"an integer from 1 to {LARGEST_SIZE}")
    settings = entry["config"]
    if type(settings) is not dict:
        raise value_error(f"{where}: config", settings, "a mapping of the fields of its site")
    call_site = entry.get("call_site", "")
    if type(call_site) is not str:
        raise value_error(f"{where}: call_site", call_site, "where its owner calls the attention, a text")
    given = {**{field: getattr(SLAConfig(), field) for field in SITE_FIELDS_FILES_MAY_LACK}, **settings}
    try:
        site_config = dataclasses.replace(config, overrides={}, **{field: given[field] for field in SITE_FIELDS})
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return GateSpec(
        heads=entry["heads"],
        head_dim=entry["head_dim"],
        config=site_config,
        model_config=config,
        path=path,
        ordinal=ordinal_of(path) or 0,
        call_site=call_site,
        traced=False,
        seen=_seen(where, entry.get("seen", list(NO_GRIDS))),
    )


def _seen(where: str, data: Any) -> SeenGrids:
    if type(data) is not list or not data or len(data) % 2 or not all(grid is None or _is_grid(grid) for grid in data):
        accepted = "[grid, grid], or two for each size, each None or [sizes, start, tokens] in integers"
        raise value_error(f"{where}: seen", data, accepted)
    return grids_from_json(data)


def _is_grid(data: Any) -> bool:
    if type(data) is not list or len(data) != 3 or type(data[0]) is not list or not 1 <= len(data[0]) <= 3:
        return False
    sizes, start, tokens = data
    return all(type(n) is int and n >= 1 for n in (*sizes, tokens)) and type(start) is int


def _tensor(opened: Any, name: str, shape: tuple[int, ...]) -> torch.Tensor | str:
    """The tensor ``name``, or why it is not read."""
    found = tuple(opened.get_slice(name).get_shape())
    if found != shape:
        return f"shape {short(found)} in the file, its site needs {shape}"
    tensor: torch.Tensor = opened.get_tensor(name)
    is_sparsity = name.endswith(f".{SPARSITY}")
    if tensor.dtype not in ((torch.int64,) if is_sparsity else FLOATING_DTYPES):
        return f"{tensor.dtype} in the file; accepted: {'torch.int64' if is_sparsity else 'a floating dtype'}"
    return tensor


def _value_problem(part: str, tensor: torch.Tensor) -> str:
    if part == SPARSITY:
        for topk, bottomk in tensor.view(-1, 2).tolist():
            if not (topk > 0 and bottomk >= 0 and topk + bottomk <= MILLION):
                return (
                    f"[{topk}, {bottomk}] in the file; accepted: topk above 0 and bottomk of at least 0, in "
                    f"millionths, together up to {MILLION}"
                )
    return ""


def _shown(name: str) -> str:
    """The name of a tensor as a file has it, for a message."""
    return name if len(name) <= 200 and name.isprintable() else short(name)


def _message(error: Exception) -> str:
    return f"no entry {error}" if isinstance(error, KeyError) else str(error)


def ordinal_of(gate_path: str) -> int | None:
    """The reverse of `gate_name`: which attention of its owner the gate at this path belongs to; None for no gate."""
    name = re.fullmatch(r"sla(?:_([1-9]\d{0,8}))?", gate_path.rpartition(".")[2])
    return None if name is None else int(name[1] or 0)
