"""An `atlas` as one HTML file that needs nothing else: no script, no style sheet and no picture from elsewhere."""

from __future__ import annotations

import base64
import io
from html import escape
from typing import TYPE_CHECKING, Any

from sla_compile.inspection.figures import sheet, site_page

if TYPE_CHECKING:
    from sla_compile.inspection.atlas import Atlas
    from sla_compile.inspection.site_atlas import HeadAtlas, SiteAtlas

__all__ = ["page"]

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; }
table { border-collapse: collapse; display: block; overflow-x: auto; margin: 1rem 0; }
th, td { border-bottom: 1px solid #8886; padding: .25rem .7rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
div { overflow-x: auto; }
img { background: white; width: 100%; min-width: 40rem; }
summary { cursor: pointer; font-weight: 600; margin: .4rem 0; }
"""

_ERRORS = ("sparse", "linear", "sum")
_CLASSES = ("critical", "marginal", "negligible")

_WORDS = """Relative errors are ||x - dense|| / ||dense||: of the sparse branch, of the linear branch before its gate,
of their sum with the gate as it is, and with a gate fitted to these batches. Recall is the share of the critical blocks
that are among the best as many; n are the keys that a query attends to; the rest is the map without its critical
blocks, and its rank the stable one, ||R||_F^2 / ||R||_2^2."""


def page(atlas: Atlas) -> str:
    """The text of the file: the sheet, a table of the attentions, and for each its curve, heads and maps.

    Raises ImportError where matplotlib is missing.
    """
    rows = [_site_row(site) for site in atlas.sites]
    columns = ["attention", "topk", "suggested", "critical mass", "best choice", "recall", *_ERRORS, "fitted"]
    parts = [
        f"<h1>{escape(atlas.model)}</h1><p>{escape(atlas.title)}.</p>",
        _image(_untitled(sheet(atlas)), "attention by class, errors, curves and topks"),
        _table(columns, rows),
        f"<p>{escape(_WORDS)}</p>",
        *(_site(site) for site in atlas.sites),
    ]
    if atlas.unreached:
        parts.append(f"<p>Not reached: {escape(', '.join(atlas.unreached))}</p>")
    head = f'<meta charset="utf-8"><title>{escape(atlas.model)}: atlas of attention</title><style>{_STYLE}</style>'
    viewport = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    body = "\n".join(parts)
    return f'<!DOCTYPE html>\n<html lang="en"><head>{viewport}{head}</head><body>\n{body}\n</body></html>\n'


def _site_row(site: SiteAtlas) -> list[str]:
    suggested = "" if site.suggested is None else _topk(site.suggested)
    shares = (site.mean("mass", "critical"), site.mean("best_mass"), site.mean("recall"))
    errors = (site.errors.sparse, site.errors.linear, site.errors.sum, site.fitted)
    return [
        site.path,
        _topk(site.topk),
        suggested,
        *map(_percent, shares),
        *map(_error, errors),
    ]


def _site(site: SiteAtlas) -> str:
    columns = ["head", *_CLASSES, "best choice", "recall", "above 1/n", "below 1/(100 n)", "rank of the rest", *_ERRORS]
    heads = [_head_row(number, head) for number, head in enumerate(site.heads)]
    topks, errors = zip(*site.curve, strict=True)
    curve = _table(["topk", *map(_topk, topks)], [["error", *map(_error, errors)]])
    times = [
        [str(b.batch), "" if b.time is None else f"{b.time:.4g}", _percent(b.critical_mass), f"{b.error:.4f}"]
        for b in site.batches
    ]
    batches = _table(["batch", "time", "critical mass", "error"], times) if len(times) > 1 else ""
    image = _image(site_page(site), f"block maps of {site.path}")
    inside = f"{curve}{_table(columns, heads)}{batches}{image}"
    return f"<details><summary>{escape(site.path)}</summary>{inside}</details>"


def _head_row(number: int, head: HeadAtlas) -> list[str]:
    shares = (*head.mass.values(), head.best_mass, head.recall, head.above_mean, head.tiny)
    errors = (head.errors.sparse, head.errors.linear, head.errors.sum)
    return [str(number), *map(_percent, shares), f"{head.rest_rank:.1f}", *map(_error, errors)]


def _table(columns: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    lines = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows)
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _image(figure: Any, text: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<div><img alt="{escape(text)}" src="data:image/svg+xml;base64,{data}"></div>'


def _untitled(figure: Any) -> Any:
    """Without its title, which the page has above it."""
    figure.suptitle("")
    return figure


def _error(error: float | None) -> str:
    return "none" if error is None else f"{error:.4f}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _topk(topk: float) -> str:
    return f"{100 * topk:.3g}%"
