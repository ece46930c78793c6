"""``atlas``: where the attention of a model goes, and what each choice of critical blocks loses, from one dense run."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sla_compile.compiler.preparation import unwrapped
from sla_compile.config import SLAConfig
from sla_compile.fitting.allocation import LADDER, AllocationReport, choose
from sla_compile.fitting.observer import Arguments, GatedCall, gated_calls, no_gated_call_message
from sla_compile.fitting.sensitivity import SiteSensitivity
from sla_compile.fitting.traced_calls import kept_traces
from sla_compile.gate import gates
from sla_compile.inspection.site_atlas import SiteAtlas, SiteSums
from sla_compile.inspection.trial import read_batches, trial_copy

__all__ = ["Atlas", "atlas"]

TIMES = ("timestep", "timesteps", "t", "time", "sigma", "sigmas", "noise_level")
"""Names of an argument of a model that says how noisy its input is."""


@dataclass(frozen=True, repr=False)
class Atlas:
    """Where a model's attention goes; prints as tables and a heat map, ``save`` draws it, ``to_dict`` for tools."""

    model: str
    """Class of the model."""
    batches: int
    budget: float
    """The topk that the allocation spends on average."""
    sites: tuple[SiteAtlas, ...]
    """In the order in which a forward calls them."""
    allocation: AllocationReport | None = None
    unreached: tuple[str, ...] = ()
    """Gates whose attention no batch reached."""

    def site(self, path: str) -> SiteAtlas:
        """The attention whose gate, or whose owner, is at module path ``path``; ValueError where there is none."""
        for site in self.sites:
            if path in (site.path, site.path.rpartition(".")[0]):
                return site
        raise ValueError(f"path: got {path!r}; accepted: one of {', '.join(site.path for site in self.sites)}")

    @property
    def title(self) -> str:
        """One line: how much attention the critical blocks hold, and the model's error where it was measured."""
        critical = sum(site.mean("mass", "critical") for site in self.sites) / len(self.sites)
        blocks = sum(site.mean("blocks", "critical") for site in self.sites) / len(self.sites)
        line = (
            f"{self.model}: {len(self.sites)} attention(s), {self.batches} batch(es): {100 * blocks:.1f}% of the "
            f"blocks are critical and hold {100 * critical:.1f}% of the attention"
        )
        if self.allocation is None:
            return line
        before, after = self.allocation.output_uniform, self.allocation.output
        return f"{line}; output error {before:.4f} with one topk, {after:.4f} with the suggested ones"

    def to_dict(self, maps: bool = True) -> dict[str, Any]:
        """Plain JSON types: the fields; with ``maps=False`` without the heads' maps, which are most of it."""
        sites = [dataclasses.asdict(site) for site in self.sites]
        for site in sites:
            for head in site["heads"] if not maps else ():
                del head["map"]
        allocation = None if self.allocation is None else self.allocation.to_dict()
        plain = {name: getattr(self, name) for name in ("model", "batches", "budget")}
        return {**plain, "sites": sites, "allocation": allocation, "unreached": list(self.unreached)}

    def to_json(self, indent: int | None = None, maps: bool = True) -> str:
        """``to_dict`` as JSON text."""
        return json.dumps(self.to_dict(maps), indent=indent)

    def figure(self, path: str | None = None) -> Any:
        """A ``matplotlib.figure.Figure``: one sheet for the model, or the page of the attention at ``path``."""
        from sla_compile.inspection.figures import sheet, site_page

        return sheet(self) if path is None else site_page(self.site(path))

    def save(self, path: str | Path, site: str | None = None) -> None:
        """Write to ``path`` a figure (.png, .svg, .pdf; of one ``site``, or the sheet), all (.html) or data (.json).

        Raises ValueError for another ending.
        """
        from sla_compile.inspection.figures import write
        from sla_compile.inspection.page import page

        write(path, {"figure": lambda: self.figure(site), "html": lambda: page(self), "json": self.to_json})

    def __rich__(self) -> Any:
        from sla_compile.inspection.terminal import AtlasView

        return AtlasView(self)

    def __str__(self) -> str:
        from sla_compile.reporting.terminal import plain_text

        return plain_text(self.__rich__(), width=100)

    def __repr__(self) -> str:
        return f"<Atlas of {self.model}: {len(self.sites)} attention(s)>"


@torch.no_grad()
def atlas(
    model: nn.Module,
    batches: Iterable[Any],
    config: SLAConfig | Mapping[str, Any] | None = None,
    *,
    max_batches: int | None = None,
    allocation: bool = True,
) -> Atlas:
    """Where the attention of ``model`` goes, from a dense run over ``batches``; nothing in the model changes.

    A copy that shares every tensor with it runs eagerly and dense, in the mode (train or eval) it is in. At each
    attention that SLA would take the true weights are computed again in chunks of query rows, and the op runs at each
    topk of ``allocate``'s ladder. Memory beyond the model's own is a few chunks, never N x N.

    Args:
        model: any module, prepared, compiled, or neither.
        batches: an iterable of tuples of positional, or mappings of keyword, arguments of the model, on its device.
        config: an ``SLAConfig`` or a mapping of its fields; by default the settings of the model's gates. Its ``topk``
            is the budget of the allocation.
        max_batches: how many batches to use at most; None: all of them. They are held in memory.
        allocation: also find the topks that ``allocate`` would choose: one more run for each attention, of at most four
            batches, for what its error does to the model's output.

    Raises:
        TypeError: ``model`` is no module, or a batch is neither a tuple nor a mapping.
        ValueError: a refused setting, no batch, a model that cannot be copied, no attention with a gate was reached, or
            numbers that are not finite.
    """
    model = unwrapped(model)
    data = read_batches(batches, max_batches)
    copied = trial_copy(model, data[0], config)
    made = gates(copied)
    budget = next(iter(made.values())).model_config.topk
    sensitivities = {path: SiteSensitivity.of_gate(path, gate, budget, LADDER) for path, gate in made.items()}
    with kept_traces(copied):
        sites = _measure(copied, data, sensitivities)
        if not sites:
            raise ValueError(no_gated_call_message(model, data[0], config))
        for path in sites:
            sensitivities[path].relative_losses()  # refuses what is not finite
        suggestion = choose(copied, data, sensitivities, len(data), budget)[0] if allocation else None
    topks = {} if suggestion is None else {site.path: site.topk for site in suggestion.sites}
    times = [_time_of(model, batch) for batch in data]
    return Atlas(
        model=type(model).__name__,
        batches=len(data),
        budget=budget,
        sites=tuple(site.atlas(path, sensitivities[path], topks.get(path), times) for path, site in sites.items()),
        allocation=suggestion,
        unreached=tuple(path for path in made if path not in sites),
    )


def _measure(
    model: nn.Module, batches: Sequence[Arguments], sensitivities: Mapping[str, SiteSensitivity]
) -> dict[str, SiteSums]:
    """Run ``model``, dense, and sum at each attention that is reached; at its ``sensitivities`` too."""
    sites: dict[str, SiteSums] = {}

    def observe(call: GatedCall) -> Tensor:
        if call.path not in sites:
            sites[call.path] = SiteSums.of(call)
        sites[call.path].add(call, number)
        sensitivities[call.path].add(call)
        return call.dense

    with gated_calls(model, observe):
        for number, (args, kwargs) in enumerate(batches):  # noqa: B007  read by observe
            model(*args, **kwargs)
    return sites


def _time_of(model: nn.Module, batch: Arguments) -> float | None:
    """The denoising time that the arguments name, mean over the batch; None where they name none."""
    try:
        arguments = inspect.signature(model.forward).bind(*batch[0], **batch[1]).arguments
    except (TypeError, ValueError):
        arguments = batch[1]
    arguments = {**arguments, **batch[1]}  # those under **kwargs too
    value = next((arguments[name] for name in TIMES if arguments.get(name) is not None), None)
    if isinstance(value, Tensor) and value.numel() and not value.is_complex():
        return value.double().mean().item()
    return float(value) if isinstance(value, int | float) else None
