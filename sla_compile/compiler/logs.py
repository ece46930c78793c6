"""What a compile did, for those who look into compiles: lines for the logger, artifacts for ``tlparse``.

``TORCH_LOGS="sla_compile"`` (or ``torch._logging.set_logs(modules={"sla_compile": logging.INFO})``) shows one line for
each site, ``TORCH_LOGS="+sla_compile"`` the rewritten graph too. With ``TORCH_TRACE`` the sites, as JSON, and the graph
are artifacts ``sla_sites`` and ``sla_rewritten_graph`` of the frame's compile. Nothing is made where nobody looks.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence

from torch import fx

from sla_compile.compat import Frame, trace_artifact
from sla_compile.compiler.site_report import describe
from sla_compile.compiler.sites import Site
from sla_compile.passes.decide import Keep

__all__ = ["log_rewritten"]

log = logging.getLogger(__name__)


def log_rewritten(gm: fx.GraphModule, sites: Sequence[Site], frame: Frame | None) -> None:
    """Tell what became of the ``sites`` of ``gm``, the rewritten graph of ``frame``; of none, nothing."""
    if not sites:
        return
    if log.isEnabledFor(logging.INFO):
        for site in sites:
            log.info("%s", _line(site))
    if log.isEnabledFor(logging.DEBUG):
        log.debug("rewritten graph:\n%s", _readable(gm))
    if frame is not None:
        trace_artifact("sla_sites", "json", lambda: json.dumps([describe(site).to_dict() for site in sites]))
        trace_artifact("sla_rewritten_graph", "string", lambda: _readable(gm))


def _line(site: Site) -> str:
    path = site.path or "the compiled module"
    if isinstance(site.decision, Keep):
        return f"{path}: kept dense, {site.decision}"
    shape, config = site.decision.shape, site.config
    keys = "" if shape.keys is None else f", {shape.keys} keys"
    return (
        f"{path}: rewritten, {shape.batch} x {shape.heads} heads x {shape.tokens} tokens{keys} x {shape.head_dim}, "
        f"topk={config.topk}, bottomk={config.bottomk}, blocks {config.block_q}x{config.block_k}"
    )


def _readable(gm: fx.GraphModule) -> str:
    text: str = gm.print_readable(print_output=False, include_stride=True)
    return text
