"""Where no attention of a model becomes sparse, that is said, with the reason of the first."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from sla_compile.compat import Frame, model_under_way
from sla_compile.compiler.site_report import SiteReport, describe, graph_break
from sla_compile.compiler.sites import Site
from sla_compile.gate import PREPARED, Gate
from sla_compile.memory import remember_told, was_told
from sla_compile.passes.decide import Keep
from sla_compile.user_warnings import warn_user

__all__ = ["warn_of_nothing", "why_nothing"]

_NOTHING = "nothing rewritten"


def why_nothing(sites: Sequence[SiteReport]) -> str:
    """Why none of the ``sites`` is rewritten, in the words of the first."""
    if not sites:
        return "none was found in its forward"
    first = sites[0]
    accepted = f"; accepted: {first.accepted}" if first.accepted else ""
    others = f", and {len(sites) - 1} more (sla_compile.explain lists them)" if len(sites) > 1 else ""
    return f"{first.path or first.owner} stays dense, {first.reason} ({first.value}{accepted}){others}"


def warn_of_nothing(gm: fx.GraphModule, sites: Sequence[Site], frame: Frame) -> None:
    """Warn, once for each model, if ``gm`` is all of it, has attention, and keeps it all dense unasked.

    Silent where ``exclude`` says so, where the model has gates or was prepared (which says it), where a graph break
    leaves other attention to other graphs, and for a part of a model: others may be rewritten.
    """
    root = frame.root_module()
    if root is None or frame.resumed or graph_break(gm) is not None or was_told(root, _NOTHING):
        return
    unasked = [s for s in sites if isinstance(s.decision, Keep) and not s.decision.reason.startswith("excluded by")]
    if not unasked or len([s for s in sites if isinstance(s.decision, Keep)]) < len(sites):
        return
    if any(PREPARED in module.__dict__ or isinstance(module, Gate) for module in root.modules()):
        return
    if {*model_under_way(root).parameters()} == {*root.parameters()}:  # no more than wrappers around it
        remember_told(root, _NOTHING)
        warn_user(
            f"no attention of {type(root).__name__} is rewritten: {why_nothing([describe(site) for site in unasked])}"
        )
