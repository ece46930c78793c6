"""Every transformer class of the installed diffusers under ``backend="sla"``; writes docs/diffusers.md.

    OMP_NUM_THREADS=1 python -m benchmarks.zoo [names ...] [--date 2026-11-24] [--write]

For each example of tests/zoo/, in a process of its own: at topk=1 the compiled model must equal the eager
one, at a smaller topk every gate must get a gradient, no graph break may be there that plain Dynamo does not also have,
and none of our warnings may be given.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import multiprocessing
import platform
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout comes before what is installed

import sla_compile
from tests.support.closeness import relative_error
from tests.zoo.registry import EXAMPLES, build, call, transformer_classes

OPTIONS: dict[str, Any] = {"min_tokens": 32, "block_q": 16, "block_k": 16}
DENSE = {**OPTIONS, "inner": "aot_eager", "topk": 1.0, "bottomk": 0.0}
SPARSE = {**OPTIONS, "inner": "eager", "topk": 0.25, "bottomk": 0.1}  # a joint graph of each class takes minutes
BUDGET = 1e-4
ALARMS = (sla_compile.DenseAttentionWarning, sla_compile.LateGatesWarning, sla_compile.UnmatchedPatternWarning)
"""Errors here: nothing in these models asks for them."""
PAGE = Path(__file__).parent.parent / "docs" / "diffusers.md"


@dataclass
class Result:
    """What one class did."""

    name: str
    failure: str = ""
    """Why it could not be built, run or compiled; empty where it could."""
    sites: list[dict[str, Any]] = field(default_factory=list)
    error: float = float("nan")
    breaks_plain: dict[str, int] = field(default_factory=dict)
    """Graph breaks without us, by reason; Dynamo alone makes them, whatever the backend."""
    breaks: dict[str, int] = field(default_factory=dict)
    dead_gates: list[str] = field(default_factory=list)
    """Parameters of gates that got no gradient, or one that is zero or not finite."""
    calls: dict[str, int] = field(default_factory=dict)
    """What the eager model calls: scaled_dot_product_attention, flex_attention, softmax over a square of tokens."""

    @property
    def rewritten(self) -> int:
        """Attentions made sparse."""
        return sum(site["rewritten"] for site in self.sites)

    @property
    def new_breaks(self) -> list[str]:
        """Graph breaks that are not there without us, or less often."""
        return [reason for reason, count in self.breaks.items() if count > self.breaks_plain.get(reason, 0)]

    @property
    def faults(self) -> list[str]:
        """Everything that must not be."""
        found = [self.failure] if self.failure else []
        if not self.failure and not self.error <= BUDGET:
            found.append(f"error {self.error:.1e} at topk=1")
        found += [f"{path} has no gradient" for path in self.dead_gates]
        return found + [f"a graph break of its own: {reason}" for reason in self.new_breaks]


class AttentionCounter(TorchFunctionMode):
    """Counts attention in an eager forward, however it is spelled."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        written_out = name == "softmax" and args[0].dim() > 2 and min(args[0].shape[-2:]) >= OPTIONS["min_tokens"]
        if written_out or name in ("scaled_dot_product_attention", "flex_attention"):
            self.calls[name] += 1
        return function(*args, **(kwargs or {}))


def examine(name: str) -> Result:
    """Run one example through all checks."""
    result = Result(name)
    model, inputs = build(name)
    with torch.no_grad():
        with AttentionCounter() as counter:
            expected = call(model, inputs)
        result.calls = dict(counter.calls)
        call(torch.compile(model, backend="eager"), inputs)
    result.breaks_plain = _graph_breaks()
    _fresh()
    with torch.no_grad():
        result.error = relative_error(call(torch.compile(model, backend="sla", options=DENSE), inputs), expected)
    result.sites = [site.to_dict() for site in sla_compile.report(model).without_diffs().sites]
    result.breaks = _graph_breaks()
    if result.new_breaks:  # starting over for the gates counts the breaks before it twice; now they are there
        _fresh()
        with torch.no_grad():
            call(torch.compile(model, backend="sla", options=DENSE), inputs)
        result.breaks = _graph_breaks()
    if sla_compile.gates(model):
        result.dead_gates = _dead_gates(name)
    return result


def _dead_gates(name: str) -> list[str]:
    _fresh()
    model, inputs = build(name)
    compiled = torch.compile(model, backend="sla", options=SPARSE)
    call(compiled, inputs).square().mean().backward()
    found = []
    for path, gate in sla_compile.gates(model).items():
        for kind, parameter in (("weight", gate.weight), ("bias", gate.bias)):
            gradient = parameter.grad
            if gradient is None or not gradient.isfinite().all() or not gradient.any():
                found.append(f"{path}.{kind}")
    return found


def _graph_breaks() -> dict[str, int]:
    from torch._dynamo.utils import counters

    return {reason.split("\n")[0]: count for reason, count in counters["graph_break"].items()}


def _fresh() -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()


def _child(name: str, pipe: Connection) -> None:
    warnings.simplefilter("ignore")
    for alarm in ALARMS:
        warnings.simplefilter("error", alarm)
    try:
        pipe.send(examine(name))
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        pipe.send(Result(name, failure=f"{type(error).__name__}: {_first_line(error)} ({where})"))


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else ""


def run(name: str, timeout: float) -> Result:
    """``examine`` in a process of its own, ended after ``timeout`` seconds."""
    context = multiprocessing.get_context("fork")  # torch and diffusers are imported once
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(name, sender))
    process.start()
    sender.close()
    try:
        result: Result = receiver.recv() if receiver.poll(timeout) else Result(name, f"no end after {timeout:.0f} s")
    except EOFError:
        result = Result(name, "the process died")
    process.kill()
    process.join()
    return result


def sparse(result: Result) -> str:
    """How many attentions are rewritten, and how many of these have a mask or are causal."""
    found = [site for site in result.sites if site["rewritten"]]
    kinds = {"masked": sum(bool(site["mask"]) for site in found), "causal": sum(site["causal"] for site in found)}
    special = ", ".join(f"{count} {kind}" for kind, count in kinds.items() if count)
    return f"{len(found)} ({special})" if special else str(len(found))


def kept(result: Result) -> str:
    """Reasons of the attentions that stay dense, each with its count and its values."""
    counts: Counter[str] = Counter()
    values: dict[str, list[str]] = {}
    for site in result.sites:
        if site["rewritten"]:
            continue
        reason = site["reason"]
        counts[reason] += 1
        known = values.setdefault(reason, [])
        if site["value"] not in known:
            known.append(site["value"])
    reasons = [f"{count} {reason} ({' and '.join(values[reason])})" for reason, count in counts.items()]
    spelled = sum(result.calls.get(name, 0) for name in ("scaled_dot_product_attention", "softmax", "flex_attention"))
    if (unseen := spelled - len(result.sites)) > 0:
        reasons.append(f"{unseen} not in a graph (Dynamo leaves the function to eager)")
    return "; ".join(reasons)


def dense_self_attention(result: Result) -> list[str]:
    """Reasons of the self-attentions over at least ``min_tokens`` tokens that stay dense."""
    return sorted(
        {
            f"{site['reason']}, {site['value']}"
            for site in result.sites
            if not site["rewritten"] and "key_tokens" not in site["shape"]
            if int(site["shape"].get("tokens", 0)) >= OPTIONS["min_tokens"]
        }
    )


def page(results: Sequence[Result], command: str, date: str) -> str:
    """docs/diffusers.md."""
    built = [result for result in results if not result.failure]
    good = [result for result in built if not result.faults]
    some = [result for result in good if result.rewritten]
    missing = sorted(transformer_classes().keys() - EXAMPLES.keys())
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "diffusers", "sla-compile"))
    total = len(transformer_classes())
    lines = [
        "# diffusers' transformer classes",
        "",
        f'{len(good)} of {total} classes compile with `backend="sla"`, equal eager at topk=1 to {BUDGET:.0e}, '
        f"give every gate a gradient and add no graph break; in {len(some)} of them self-attention is rewritten.",
        "",
        f"Measured with {versions}, Python {platform.python_version()}, on the CPU, by `{command}` on {date}. "
        "Tiny random models, blocks of 16, `min_tokens=32`: tests/zoo/. "
        "Graph breaks: ours / those of plain Dynamo.",
        "",
        "| class | attentions | rewritten | kept, and why | error at topk=1 | graph breaks |",
        "| --- | ---: | ---: | --- | ---: | ---: |",
    ]
    for result in sorted(built, key=lambda result: result.name):
        breaks = f"{sum(result.breaks.values())} / {sum(result.breaks_plain.values())}"
        counts = f"{result.name} | {len(result.sites)} | {sparse(result)}"
        lines.append(f"| {counts} | {kept(result)} | {result.error:.0e} | {breaks} |")
    lines += ["", "## Self-attention that stays dense", ""]
    lines += [f"- {result.name}: {'; '.join(why)}" for result in built if (why := dense_self_attention(result))]
    faults = [(result.name, fault) for result in results for fault in result.faults]
    faults += [(name, "no example") for name in missing]
    lines += ["", "## Not built, not run, or not right", ""]
    lines += [f"- {name}: {fault}" for name, fault in faults] or ["None."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the examples that are named, or all; print one line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="classes; all by default")
    parser.add_argument("--timeout", type=float, default=180.0, help="seconds for one class")
    parser.add_argument("--date", default=datetime.date.today().isoformat())
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.parent.name}/{PAGE.name}")
    parser.add_argument("--json", type=Path, help="keep every result there; named classes replace their own")
    options = parser.parse_args()
    known: dict[str, Result] = {}
    if options.json and options.json.exists():
        known = {found["name"]: Result(**found) for found in json.loads(options.json.read_text())}
    for name in options.names or EXAMPLES:
        result = run(name, options.timeout)
        known[name] = result
        if options.json:
            options.json.write_text(json.dumps([vars(result) for result in known.values()], indent=1))
        line = f"{name}: {result.rewritten} of {len(result.sites)}, error {result.error:.1e}, kept: {kept(result)}"
        print(line, *result.faults, sep="\n    FAULT ", flush=True)
    if options.write:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(page(list(known.values()), "python -m benchmarks.zoo --write", options.date))


if __name__ == "__main__":
    main()
