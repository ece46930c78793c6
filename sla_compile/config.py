"""``SLAConfig``: every setting of sla-compile, frozen, hashable and checked when it is made.

Importing this module imports neither Inductor nor Triton: Inductor's own options are looked up on first use.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from sla_compile.common.limits import FEATURE_MAPS, GATE_FORMS, LINEAR_BRANCHES, TAYLOR, TEXT, TOPK_OWNERS
from sla_compile.common.token_orders import RASTER
from sla_compile.config_inductor import frozen_inductor, inductor_name
from sla_compile.config_shares import (
    check_all_read,
    check_shares,
    check_topk_by,
    default_bottomk,
    with_bottomk,
    without_unread,
)
from sla_compile.config_values import (
    BLOCK_SIZE,
    BOOLEAN,
    GRID_SIZES,
    OPTIONAL_INTEGER,
    OPTIONAL_MAX_TOPK,
    OPTIONAL_MIN_TOKENS,
    TOKEN_ORDER,
    TOKEN_RANGES,
    FrozenMapping,
    Validator,
    mapping,
    nearest_hint,
    number,
    one_of,
    short,
    string_list,
    value_error,
)

__all__ = [
    "MODES",
    "SITE_FIELDS",
    "SITE_FIELDS_FILES_MAY_LACK",
    "VERSION",
    "FrozenMapping",
    "SLAConfig",
]

VERSION = 1
"""Version of the JSON form."""

SITE_FIELDS = (
    *("topk", "bottomk", "feature_map", "linear", "gate", "min_tokens", "block_q", "block_k"),
    *("always_critical", "cross_attention", "max_topk", "reorder", "grid", "grid_start", "sparse_scale"),
    "topk_by",
)
"""The fields that an override may set for one site."""

SITE_FIELDS_FILES_MAY_LACK = SITE_FIELDS[SITE_FIELDS.index("always_critical") :]
"""Site fields that were added after the format of gate files: a file without one means its default."""

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
"""What ``torch.compile(mode=...)`` accepts with this backend."""


_INDUCTOR = mapping("a mapping of Inductor option names to values that JSON can hold")
_OVERRIDES = mapping("a mapping of glob patterns to mappings of " + ", ".join(SITE_FIELDS))


_WHAT_TOPK_LEAVES: Any = object()


def _setting(default: Any, validator: Validator) -> Any:
    """A dataclass field; ``__post_init__`` runs its value through ``validator``."""
    return field(default=default, metadata={"validator": validator})


@dataclass(frozen=True, kw_only=True)
class SLAConfig:
    """The settings: how key blocks are classified, what is computed on them, at which sites, and how that is compiled.

    Precedence: for a site, ``overrides`` whose pattern matches its module path win over the top-level fields, and
    among those a later one over an earlier one. An unknown field or a refused value raises ValueError.
    """

    topk: float = _setting(0.05, number("a number above 0 and up to 1", lambda value: 0 < value <= 1))
    """Share of a row's key blocks that is critical (exact attention), at least one block. Range (0, 1]."""

    bottomk: float = _setting(_WHAT_TOPK_LEAVES, number("a number from 0 to 1", lambda value: 0 <= value <= 1))
    """Share of a row's key blocks that is negligible (skipped). Range [0, 1], topk + bottomk at most 1. By default 0;
    with another linear than "taylor" 0.1, or what a larger topk leaves."""

    block_q: int = _setting(64, BLOCK_SIZE)
    """Query tokens in a block. Range: 16, 32, 64, 128 or 256."""

    block_k: int = _setting(64, BLOCK_SIZE)
    """Key tokens in a block. Range: 16, 32, 64, 128 or 256."""

    feature_map: str = _setting("softmax", one_of(*FEATURE_MAPS))
    """Feature map of the linear branch. Range: "softmax" (over the head dimension), "elu" (+ 1), "relu"; with
    linear="taylor" there is none, and the last two are refused."""

    linear: str = _setting(TAYLOR, one_of(*LINEAR_BRANCHES))
    """What stands for the key blocks that are not critical. Range: "taylor", for each marginal block a virtual key in
    the softmax of the critical ones, with its values to first order; a linear branch over the "marginal" blocks (the
    paper) or over "all" (the authors' release); or "none". See docs/quality.md."""

    gate: str = _setting("shared", one_of(*GATE_FORMS))
    """Weight and bias of a site's gate. Range: "shared" by its heads, (D, D) and (D), or "per_head", (H, D, D) and
    (H, D). With linear="taylor" the gate is one number for each head, and "per_head" is refused."""

    sparse_scale: bool = _setting(False, BOOLEAN)
    """Whether each head's sparse branch has a trainable scale: O = exp(log_scale) O^s + O^l W^T + b. Range: True or
    False. O^s, normalised over the critical keys alone, is the dense output's part times 1 / (critical mass of the
    softmax), too large (SLA2, arXiv 2602.12675); W and b cannot undo that, a number can. With linear="taylor" there is
    one normalisation, and this is refused. See docs/fine-tuning.md."""

    min_tokens: int | None = _setting(None, OPTIONAL_MIN_TOKENS)
    """Attention over fewer tokens stays dense: SLA is not faster there. None: by the device, 6144 on a GPU, 768 on a
    CPU. Range: any integer of at least 0."""

    always_critical: tuple[tuple[int, int | None], ...] | str = _setting((), TOKEN_RANGES)
    """Key tokens whose blocks are critical in every row, besides ``topk``. Range: (start, stop) pairs, as in slices, or
    "text": what lies outside ``grid``."""

    cross_attention: bool = _setting(False, BOOLEAN)
    """Whether cross-attention (keys from other tokens than the queries) is rewritten too. Range: True or False."""

    max_topk: float | None = _setting(None, OPTIONAL_MAX_TOPK)
    """Largest topk that ``set_sparsity`` may set, with no recompilation; None: none. Range: from topk up to 1."""

    topk_by: str = _setting("site", one_of(*TOPK_OWNERS))
    """What has a topk of its own, for ``allocate``. Range: "site", or with max_topk "head", each head of a site."""

    reorder: str = _setting(RASTER, TOKEN_ORDER)
    """Order of a video's tokens inside the attention. Range: "raster" (the model's own), "tiles", "hilbert", or
    "tiles:1" to "tiles:99", tiles of at most so many frames; or a list of these, one for each head, which is stored
    joined by commas."""

    grid: tuple[int, ...] | None = _setting(None, GRID_SIZES)
    """Tokens of the video along each axis; None: read off the graph where they matter. Range: (T, H, W) or (H, W)."""

    grid_start: int | None = _setting(None, OPTIONAL_INTEGER)
    """First token of ``grid``, from the end if negative; None: the grid is all tokens. Range: any integer."""

    inner: str = _setting("inductor", one_of("inductor", "aot_eager", "eager"))
    """What compiles the rewritten graph. Range: "inductor", "aot_eager", "eager"."""

    inductor: Mapping[str, Any] = _setting(FrozenMapping({}), _INDUCTOR)
    """Inductor's own options, stored sorted by name. Range: names and types of ``torch._inductor.list_options()``."""

    include: tuple[str, ...] = _setting(("*",), string_list("a list or tuple of at least one glob pattern", 1))
    """Glob patterns over module paths ("blocks.*.attn1"), one of which must match. Range: one or more."""

    exclude: tuple[str, ...] = _setting((), string_list("a list or tuple of glob patterns", 0))
    """Glob patterns over module paths that stay dense, whatever ``include`` says. Range: any number."""

    overrides: Mapping[str, Mapping[str, Any]] = _setting(FrozenMapping({}), _OVERRIDES)
    """Glob pattern over module paths -> fields of those sites. Range: ``SITE_FIELDS``, each in its range."""

    def __new__(cls, *args: Any, **fields: Any) -> SLAConfig:
        """Refuse an unknown field by a ValueError that names the nearest known one."""
        _refuse_unknown("SLAConfig", fields, _field_names())
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if value is _WHAT_TOPK_LEAVES:
                value = default_bottomk(self.topk, self.linear)
            object.__setattr__(self, f.name, f.metadata["validator"].check(f"SLAConfig.{f.name}", value))
        check_shares("SLAConfig", self.topk, self.bottomk, self.max_topk)
        check_topk_by("SLAConfig", self.topk_by, self.max_topk)
        _check_grid_start("SLAConfig", self.grid, self.grid_start)
        object.__setattr__(self, "inductor", frozen_inductor(self.inductor))
        if self.inductor and self.inner != "inductor":
            raise ValueError(
                f"SLAConfig.inductor: got {dict(self.inductor)!r} with inner={self.inner!r}; "
                f"accepted: Inductor options (torch.compile's mode gives some too) only with inner='inductor'"
            )
        object.__setattr__(self, "overrides", _frozen_overrides(self.overrides, self))
        check_all_read(self.linear, vars(self), self.overrides)

    @classmethod
    def check_value(cls, name: str, value: Any) -> Any:
        """The stored form of ``value`` for the field ``name`` alone; ValueError where it is refused."""
        validators = {f.name: f.metadata["validator"] for f in dataclasses.fields(cls)}
        return validators[name].check(name, value)

    @property
    def looks_for_grid(self) -> bool:
        """Whether the grid of the tokens, or its place among them, is to be read off the graph."""
        return self.grid_start is None and (self.reorder != RASTER or self.always_critical == TEXT)

    def rejects(self, path: str) -> str | None:
        """Why the site at module path ``path`` is not selected, naming the pattern; None where it is."""
        for pattern in self.exclude:
            if fnmatchcase(path, pattern):
                return f"excluded by exclude pattern {pattern!r}"
        if not any(fnmatchcase(path, pattern) for pattern in self.include):
            return "matched by no include pattern: " + ", ".join(map(repr, self.include))
        return None

    def selects(self, path: str) -> bool:
        """Whether the site at module path ``path`` is selected."""
        return self.rejects(path) is None

    def for_site(self, path: str) -> SLAConfig:
        """The settings of the site at module path ``path``: its overrides applied, and ``overrides`` empty.

        Raises ValueError where overrides that match together ask for topk + bottomk above 1, topk above max_topk, or
        a setting of the linear branch with linear="taylor".
        """
        matching = [pattern for pattern in self.overrides if fnmatchcase(path, pattern)]
        changes: dict[str, Any] = {}
        for pattern in matching:
            changes.update(self.overrides[pattern])
        changes = with_bottomk(self.topk, self.bottomk, self.linear, changes)
        where = f"SLAConfig.overrides {short(matching)} at {short(path)}"
        _check_changed_shares(where, self, changes)
        changes = without_unread(where, self.linear, changes)
        return dataclasses.replace(self, overrides={}, **changes)

    def changed(self, fields: Mapping[str, Any]) -> SLAConfig:
        """These settings with ``fields`` changed; where topk is and bottomk is not, a default bottomk follows topk."""
        return dataclasses.replace(self, **with_bottomk(self.topk, self.bottomk, self.linear, fields))

    def kernel_options(self) -> dict[str, Any]:
        """The fields that are keyword arguments of ``sparse_linear_attention``."""
        names = ("topk", "bottomk", "block_q", "block_k", "feature_map", "linear")
        return {name: getattr(self, name) for name in names}

    def compiled_options(self) -> dict[str, Any]:
        """``kernel_options`` as constants of a graph.

        With ``max_topk`` the gate's buffer holds topk and bottomk; the constants are then only their bounds.
        """
        compiled = {} if self.max_topk is None else {"topk": self.max_topk, "bottomk": 0.0}
        return {**self.kernel_options(), **compiled}

    def to_dict(self) -> dict[str, Any]:
        """Every field and the version, in plain JSON types."""
        result: dict[str, Any] = {"version": VERSION}
        for name in _field_names():
            value = getattr(self, name)
            result[name] = dict(value) if isinstance(value, Mapping) else value
        return dict(json.loads(json.dumps(result)))

    def to_json(self) -> str:
        """``to_dict`` as JSON text."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SLAConfig:
        """The reverse of ``to_dict``; a missing field has its default, an unknown one is a ValueError."""
        if not isinstance(data, Mapping):
            raise value_error("SLAConfig", data, "a mapping of fields")
        fields = dict(data)
        version = fields.pop("version", None)
        if type(version) is not int or version != VERSION:
            raise value_error("SLAConfig version", version, str(VERSION))
        _refuse_unknown("SLAConfig", fields, _field_names())
        return cls(**fields)

    @classmethod
    def from_json(cls, text: str) -> SLAConfig:
        """The reverse of ``to_json``."""
        try:
            data = json.loads(text)
        except (TypeError, ValueError) as error:
            raise value_error("SLAConfig JSON", text, f"JSON text ({error})") from error
        return cls.from_dict(data)

    @classmethod
    def from_options(
        cls, options: Mapping[str, Any] | SLAConfig | None = None, *, mode: str | None = None
    ) -> SLAConfig:
        """The configuration in ``torch.compile``'s ``options`` and ``mode``.

        A key that is a field sets it; one that is an Inductor option goes into ``inductor``, where it wins over what
        ``mode`` implies. "-" is read as "_" in both, as torch does. An unknown key or mode raises ValueError.
        """
        if mode is not None and (type(mode) is not str or mode not in MODES):
            accepted = "one of " + ", ".join(map(repr, MODES))
            raise value_error("mode", mode, accepted, nearest_hint(mode, MODES))
        config = options if isinstance(options, SLAConfig) else _from_mapping(options)
        if mode is None or mode == "default":  # torch.compile never hands "default" on
            return config
        if config.inner != "inductor":
            raise value_error("mode", mode, f"only with inner='inductor', not with inner={config.inner!r}")
        from torch._inductor import list_mode_options

        return dataclasses.replace(config, inductor={**list_mode_options(mode), **config.inductor})

    def fingerprint(self) -> str:
        """SHA-256 of the JSON form, for cache keys: the same in every process for equal settings."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


def _field_names() -> tuple[str, ...]:
    return tuple(f.name for f in dataclasses.fields(SLAConfig))


def _refuse_unknown(where: str, fields: Mapping[Any, Any], known: tuple[str, ...]) -> None:
    for name, value in fields.items():
        if name not in known:
            hint = nearest_hint(name, known, always=True)
            raise value_error(f"unknown field {short(name)} of {where}", value, ", ".join(known), hint)


def _check_grid_start(name: str, grid: tuple[int, ...] | None, start: int | None) -> None:
    if grid is None and start is not None:
        raise ValueError(f"{name}: got grid_start={start} and no grid; accepted: grid_start beside a grid")


def _check_changed_shares(name: str, config: SLAConfig, changes: Mapping[str, Any]) -> None:
    topk, bottomk, max_topk = (changes.get(n, getattr(config, n)) for n in ("topk", "bottomk", "max_topk"))
    check_shares(name, topk, bottomk, max_topk)


def _frozen_overrides(overrides: Mapping[str, Any], config: SLAConfig) -> FrozenMapping:
    """``overrides`` with every value checked and in its stored form.

    Each is checked together with the top-level fields alone; ``for_site`` checks those that match one path together.
    """
    validators = {f.name: f.metadata["validator"] for f in dataclasses.fields(SLAConfig)}
    frozen = {}
    for pattern, changes in overrides.items():
        where = f"SLAConfig.overrides[{short(pattern)}]"
        if type(pattern) is not str or not isinstance(changes, Mapping):
            raise value_error(where, changes, _OVERRIDES.accepted)
        _refuse_unknown(where, changes, SITE_FIELDS)
        checked = {n: validators[n].check(f"{where}.{n}", changes[n]) for n in SITE_FIELDS if n in changes}
        _check_changed_shares(where, config, with_bottomk(config.topk, config.bottomk, config.linear, checked))
        _check_grid_start(where, *(checked.get(n, getattr(config, n)) for n in ("grid", "grid_start")))
        frozen[pattern] = checked
    return FrozenMapping(frozen)


def _from_mapping(options: Mapping[str, Any] | None) -> SLAConfig:
    if options is None:
        return SLAConfig()
    if not isinstance(options, Mapping):
        raise value_error("options", options, "a mapping or an SLAConfig")
    names = _field_names()
    fields: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    for key, value in options.items():
        name = key.replace("-", "_") if isinstance(key, str) else key
        if name in names or name == "version":
            if name in fields:
                raise value_error(f"option {key!r}", value, f"{name!r} once")
            fields[name] = value
        elif inductor_name(key) is not None:
            extra[key] = value
        else:
            from torch._inductor import list_options

            accepted = f"SLAConfig's fields ({', '.join(names)}) and torch._inductor.list_options()"
            hint = nearest_hint(key, names, tuple(list_options()), always=True)
            raise value_error(f"unknown option {short(key)}", value, accepted, hint)
    if extra:
        given = _INDUCTOR.check("SLAConfig.inductor", fields.get("inductor", {}))
        if twice := sorted(set(extra) & set(given)):
            raise value_error(f"option {twice[0]!r}", extra[twice[0]], "it once, not under 'inductor' too")
        fields["inductor"] = {**given, **extra}
    return SLAConfig.from_dict({"version": VERSION, **fields})
