"""Gates on disk: one safetensors file with every gate, the configuration and the sites they were trained for.

Tensors ``<gate path>.weight`` and ``<gate path>.bias``, with ``sparse_scale`` ``<gate path>.log_scale`` and with
``max_topk`` ``<gate path>.sparsity``; metadata
``format``, ``version``, ``config`` (JSON of ``SLAConfig``) and ``sites`` (JSON list of path, heads, head_dim and the
site's settings). Nothing in the model changes before the whole file has been read and compared with it.
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

from sla_compile.common.limits import FLOATING_DTYPES
from sla_compile.config import SITE_FIELDS, SITE_FIELDS_FILES_MAY_LACK, SLAConfig
from sla_compile.gate import MILLION, Gate, attach_gate, detach_gate, gates, mark_prepared, model_config
from sla_compile.gate_settings import UNSEEN, Seen, as_seen, written
from sla_compile.module_paths import module_paths

__all__ = ["File", "Site", "load", "not_plain", "raise_listed", "read", "save"]

FORMAT, VERSION = "sla_compile", "1"
# How a graph is compiled changes nothing that a gate learns.
COMPILE_FIELDS = ("inner", "inductor")
SPARSITY = "sparsity"


@dataclass(frozen=True)
class Site:
    """One gate of a file: where it belongs, its settings and its parameters."""

    path: str
    heads: int
    head_dim: int
    config: SLAConfig
    tensors: dict[str, torch.Tensor]
    seen: Seen = UNSEEN

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes that heads, head_dim, the kind of gate, ``sparse_scale`` and ``max_topk`` ask for."""
        lead = (self.heads,) if self.config.gate == "per_head" else ()
        shapes: dict[str, tuple[int, ...]] = {"weight": (*lead, self.head_dim, self.head_dim)}
        shapes["bias"] = (*lead, self.head_dim)
        if self.config.sparse_scale:
            shapes["log_scale"] = (self.heads,)
        return shapes if self.config.max_topk is None else shapes | {SPARSITY: (2,)}

    def settings(self) -> dict[str, Any]:
        """The fields of ``SITE_FIELDS``; topk and bottomk as they were last set."""
        settings = {name: getattr(self.config, name) for name in SITE_FIELDS}
        if SPARSITY in self.tensors:
            settings["topk"], settings["bottomk"] = (part / MILLION for part in self.tensors[SPARSITY].tolist())
        return settings


@dataclass(frozen=True)
class File:
    """A gate file; ``problems`` says, one line each, which tensors do not fit its own list of sites."""

    config: SLAConfig
    sites: dict[str, Site]
    problems: list[str]


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the gates of ``model`` (compiled or not) and its configuration to ``path``, atomically.

    Raises ValueError where the model has no gates, or where gate parameters are sharded, fake or on meta;
    FileNotFoundError where ``path`` is in no folder that exists.
    """
    found = gates(model)
    config = model_config(model)
    if not found or config is None:
        raise ValueError(
            f"save: {type(model).__name__} has no SLA gates; accepted: a model after sla_compile.prepare, "
            f"or after the first call of torch.compile(model, backend='sla')"
        )
    problems = [line for name, gate in found.items() for line in not_plain(name, gate)]
    raise_listed(f"save to {os.fspath(path)!r}", problems)
    tensors, sites = {}, []
    for name, gate in found.items():
        for part, tensor in gate.state_dict().items():
            tensors[f"{name}.{part}"] = tensor.detach().cpu().contiguous().clone()
        settings = {field: getattr(gate.config, field) for field in SITE_FIELDS}
        site = {"path": name, "heads": gate.heads, "head_dim": gate.head_dim, "config": settings}
        sites.append(site | ({"seen": written(gate.seen)} if any(gate.seen) else {}))
    metadata = {"format": FORMAT, "version": VERSION, "config": config.to_json(), "sites": json.dumps(sites)}
    _write(path, to_safetensors(tensors, metadata))


def load(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Load the gates in ``path`` into ``model`` and return it.

    A model without gates gains them first, with the file's configuration, each on the device and in the dtype
    of its owner's parameters; the gates of a prepared model are overwritten in place. ``requires_grad`` and
    the random state stay as they are.

    Raises FileNotFoundError where there is no file; ValueError where it is truncated, foreign or of another
    version, where the model was prepared with other settings (naming the fields), or where gates are missing,
    extra or wrongly shaped, or have no owner in the model (naming each). The model is then unchanged.
    """
    file = read(path)
    found = gates(model)
    with torch.no_grad():
        if found:
            _check_settings(path, file, model_config(model), found)
            raise_listed(_load_of(path, model), [*file.problems, *_misfits(file, found)])
            for name, gate in found.items():
                _fill(gate, file.sites[name])
        else:
            modules = _modules(model)
            raise_listed(_load_of(path, model), [*file.problems, *_unfit_owners(file, modules)])
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


def read(path: str | os.PathLike[str]) -> File:
    """The file's content; ValueError naming ``path`` and what was found where it is not a whole gate file."""
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
        raise ValueError(f"load: {name!r} has metadata that cannot be read: {_words(error)}") from error


def _parse(metadata: dict[str, str], tensors: dict[str, torch.Tensor]) -> File:
    """Raises KeyError, TypeError or ValueError where metadata and tensors do not fit together."""
    config = _config_of(json.loads(metadata["config"]))
    sites: dict[str, Site] = {}
    problems: list[str] = []
    left = dict(tensors)
    for entry in json.loads(metadata["sites"]):
        path, heads, head_dim = entry["path"], entry["heads"], entry["head_dim"]
        if type(path) is not str or type(heads) is not int or type(head_dim) is not int:
            raise ValueError(f"site {entry!r}; accepted: a path with integer heads and head_dim")
        given = {**{field: getattr(SLAConfig(), field) for field in SITE_FIELDS_FILES_MAY_LACK}, **entry["config"]}
        settings = {field: given[field] for field in SITE_FIELDS}
        own = dataclasses.replace(config, overrides={}, **settings)
        site = Site(path, heads, head_dim, own, {}, as_seen(entry.get("seen", UNSEEN)))
        for part, shape in site.shapes().items():
            tensor = left.pop(f"{path}.{part}", None)
            if tensor is None:
                problems.append(f"{path}.{part}: missing in the file")
            elif tuple(tensor.shape) != shape:
                problems.append(f"{path}.{part}: shape {tuple(tensor.shape)} in the file, its site needs {shape}")
            elif tensor.dtype not in ((torch.int64,) if part == SPARSITY else FLOATING_DTYPES):
                accepted = "torch.int64" if part == SPARSITY else "a floating dtype"
                problems.append(f"{path}.{part}: {tensor.dtype} in the file; accepted: {accepted}")
            else:
                site.tensors[part] = tensor
        sites[path] = site
    if not sites:
        raise ValueError("no site in the list of sites")
    problems += [f"{name}: extra in the file, of no site in its list" for name in sorted(left)]
    return File(config, sites, problems)


def _config_of(data: dict[str, Any]) -> SLAConfig:
    """The configuration; Inductor options that this torch refuses are left out with a warning, not fatal."""
    try:
        return SLAConfig.from_dict(data)
    except ValueError as error:
        if not (isinstance(data, dict) and data.get("inductor")):
            raise
        config = SLAConfig.from_dict({**data, "inductor": {}})
        warnings.warn(f"load: the file's Inductor options are left out: {error}", stacklevel=5)
        return config


def _words(error: Exception) -> str:
    return f"no entry {error}" if isinstance(error, KeyError) else str(error)


def _differences(theirs: SLAConfig, ours: SLAConfig) -> list[str]:
    """``field: value in the file, value in the model`` of every field that changes what a gate learns."""
    pairs = [(f.name, getattr(theirs, f.name), getattr(ours, f.name)) for f in dataclasses.fields(SLAConfig)]
    return [
        f"{name} is {there!r} in the file, {here!r} in the model"
        for name, there, here in pairs
        if there != here and name not in COMPILE_FIELDS
    ]


def _check_settings(path: str | os.PathLike[str], file: File, config: SLAConfig | None, found: dict[str, Gate]) -> None:
    differences = _differences(file.config, config) if config is not None else []
    if not differences:
        differences = [
            f"{name}: {line}"
            for name, gate in found.items()
            if name in file.sites
            for line in _differences(file.sites[name].config, gate.config)
        ]
    if differences:
        raise ValueError(
            f"load of {os.fspath(path)!r}: its gates were trained for other settings than the model was "
            f"prepared with: {'; '.join(differences)}; "
            f"accepted: a model prepared with the file's settings, or not prepared"
        )


def _misfits(file: File, found: dict[str, Gate]) -> Iterator[str]:
    """Why the file's gates do not fit those of a prepared model, one line each."""
    for name in found:
        if name not in file.sites:
            yield f"{name}: missing in the file"
    for name, site in file.sites.items():
        if name not in found:
            yield f"{name}: extra in the file, no such gate in the model"
            continue
        yield from not_plain(name, found[name])
        for part, tensor in site.tensors.items():
            here = tuple(getattr(found[name], part).shape)
            if here != tuple(tensor.shape):
                yield f"{name}.{part}: shape {tuple(tensor.shape)} in the file, {here} in the model"


def not_plain(name: str, gate: Gate) -> Iterator[str]:
    """Why the parameters of ``gate``, called ``name``, cannot be read or written as they are, one line each."""
    for part, parameter in gate.named_parameters():
        if type(parameter) not in (torch.Tensor, nn.Parameter):
            kind = type(parameter).__name__
            yield f"{name}.{part}: a {kind}; accepted: a plain tensor, gathered before (full_tensor)"
        elif parameter.is_meta:
            yield f"{name}.{part}: on the meta device; accepted: a tensor with values"


def raise_listed(action: str, problems: list[str]) -> None:
    """Raise one ValueError that says every problem, if there is any."""
    if problems:
        raise ValueError(f"{action}: {len(problems)} problem(s), nothing was changed:\n  " + "\n  ".join(problems))


def _load_of(path: str | os.PathLike[str], model: nn.Module) -> str:
    return f"load of {os.fspath(path)!r} into {type(model).__name__}"


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module by the path that ``gates`` would give it; of a wrapped module the one inside."""
    return dict(module_paths(model))


def _unfit_owners(file: File, modules: dict[str, nn.Module]) -> Iterator[str]:
    """Why the file's gates cannot be put into a model that has none, one line each."""
    for name in file.sites:
        owner_path, _, child = name.rpartition(".")
        owner = modules.get(owner_path)
        if not re.fullmatch(r"sla(_[1-9]\d*)?", child):
            yield f"{name}: no gate path; accepted: its owner's path, then sla, sla_1, ..."
        elif owner is None:
            yield f"{name}: no module {owner_path!r} in the model"
        elif hasattr(owner, child):
            yield f"{name}: the module has another attribute {child!r} already"
        elif _home(modules, owner_path)[0].type == "meta":
            yield f"{name}: its owner is on the meta device; accepted: an owner with values"


def _attach(file: File, modules: dict[str, nn.Module]) -> None:
    """Inject the file's gates and fill them; none is left behind if one fails."""
    attached: list[tuple[nn.Module, int]] = []
    try:
        for name, site in file.sites.items():
            owner_path, _, child = name.rpartition(".")
            owner, ordinal = modules[owner_path], int(child.partition("_")[2] or 0)
            device, dtype = _home(modules, owner_path)
            attached.append((owner, ordinal))
            gate = attach_gate(
                owner,
                ordinal,
                head_dim=site.head_dim,
                heads=site.heads,
                config=site.config,
                model_config=file.config,
                device=device,
                dtype=dtype or site.tensors["weight"].dtype,
                path=name,
                seen=site.seen,
            )
            _fill(gate, site)
    except BaseException:
        for owner, ordinal in attached:
            detach_gate(owner, ordinal)
        raise


def _fill(gate: Gate, site: Site) -> None:
    for part, tensor in site.tensors.items():
        getattr(gate, part).copy_(tensor)


def _home(modules: dict[str, nn.Module], path: str) -> tuple[torch.device, torch.dtype | None]:
    """Device and floating dtype of the owner's parameters, or of the nearest module around it with any."""
    while True:
        for parameter in modules[path].parameters():
            if parameter.dtype in FLOATING_DTYPES:
                return parameter.device, parameter.dtype
        if not path:
            return torch.device("cpu"), None
        path = path.rpartition(".")[0]
