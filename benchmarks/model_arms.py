"""What `benchmarks/models.py` compares: dense attention, SLA, float8 and a floor, each with a process of its own."""

from __future__ import annotations

import argparse
import contextlib
import os
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.published import Published
from sla_compile.inspection.timing import run_times

__all__ = ["ARMS", "BASES", "USUAL", "USUAL_FLOAT8", "WHAT", "serve"]

_REST = (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
CUDNN = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, *_REST)
FLASH = (SDPBackend.FLASH_ATTENTION, *_REST)  # beside cuDNN's, compiled code takes that


@dataclass(frozen=True)
class How:
    """What an arm computes."""

    dense: tuple[SDPBackend, ...] | None = CUDNN
    """Kernels of dense attention, the first that can: cross-attention is dense in every arm. None: torch's choice."""
    sla: dict[str, Any] | None = None
    """Settings of SLA; None: dense."""
    floor: bool = False
    """No self-attention."""
    float8: bool = False
    training: bool = True


SLA: dict[str, Any] = {"linear": "marginal", "block_q": 128, "block_k": 128}
"""The paper's form, of which the published figures are."""
SLA64 = {**SLA, "block_q": 64, "block_k": 64}
ARMS = {
    "cuDNN": How(),
    "flash": How(FLASH),
    "torch's default": How(None),
    "SLA": How(sla=SLA),
    "SLA 64x64": How(sla=SLA64),
    "SLA, virtual keys": How(sla={**SLA, "linear": "taylor"}),
    "SLA, tiles": How(sla={**SLA, "reorder": "tiles"}),
    "SLA, an order for each head": How(sla={**SLA, "reorder": ("tiles:4", "raster")}),
    "SLA 64x64, tiles": How(sla={**SLA64, "reorder": "tiles"}),
    "float8": How(float8=True, training=False),
    "SLA, float8": How(sla=SLA, float8=True, training=False),
    "floor": How(floor=True),
}
BASES = ("cuDNN", "flash", "torch's default")
USUAL = ("cuDNN", "flash", "SLA", "floor")
USUAL_FLOAT8 = ("cuDNN", "SLA", "float8", "SLA, float8")
WHAT = ("forward", "training step")

_TINY = {"block_q": 16, "block_k": 16, "min_tokens": 32}


class Arm:
    """A model compiled in this process, and its two calls."""

    def __init__(self, name: str, model: Published, options: argparse.Namespace) -> None:
        self.how, self.options, self.cuda = ARMS[name], options, options.device == "cuda"
        if self.how.floor:
            leave_self_attention_out()
        self.model: Any = model.build(options.device)
        self.example = model.example(self.model, options.device)
        if self.how.float8:
            make_float8(self.model)
        if model.counts:
            torch._dynamo.config.capture_dynamic_output_shape_ops = True
        how: dict[str, Any] = {"backend": options.inner}
        if self.how.sla is not None:
            settings: dict[str, Any] = {**self.how.sla, **(_TINY if options.tiny else {}), "inner": options.inner}
            if "reorder" in settings:
                settings["grid"] = model.grid
            if isinstance(settings.get("reorder"), tuple):  # in turn
                config: Any = self.model.config
                orders, heads = settings["reorder"], config.num_attention_heads
                settings["reorder"] = [orders[head % len(orders)] for head in range(heads)]
            how = {"backend": "sla", "options": settings}
        if options.whole:
            self.model.compile(**how)
        else:
            compile_blocks(self.model, how)

    def first(self, what: str) -> dict[str, Any]:
        """Seconds of the first call, which compiles; the sites of SLA, and graph breaks by reason."""
        from torch._dynamo.utils import counters

        if what == "training step":
            self.model.train()
            self.model.enable_gradient_checkpointing()
        started = time.perf_counter()
        self.call(what)
        found: dict[str, Any] = {"first_s": time.perf_counter() - started}
        found["breaks"] = {str(reason).split("\n")[0]: count for reason, count in counters["graph_break"].items()}
        counters["graph_break"].clear()
        if self.how.sla is not None:
            import sla_compile  # not in arms without it

            sites = sla_compile.report(self.model).to_dict()["sites"]
            found["rewritten"] = dict(Counter(f"{s['reason']}: {s['value']}" for s in sites if s["rewritten"]))
            kept = (f"{s['reason']}: {s['value']} (accepted: {s['accepted']})" for s in sites if not s["rewritten"])
            found["kept"] = dict(Counter(kept))
        self._let_others()
        return found

    def timed(self, what: str) -> dict[str, Any]:
        """Milliseconds of calls after one to warm up, their peak memory, and what computed dense attention."""
        self.model.train(what == "training step")
        call = partial(self.call, what)
        call()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        found: dict[str, Any] = {"ms": run_times(call, seconds=self.options.timing)}
        if self.cuda:
            found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        if what == "forward":
            found["sdpa"] = dense_kernels(call)
            if self.options.float8:
                found["output"] = self.call(what).float().cpu().numpy()
        self._let_others()
        return found

    def call(self, what: str) -> Tensor:
        """One forward or training step, to its end on the device; its output."""
        dense = self.how.dense
        with contextlib.nullcontext() if dense is None else sdpa_kernel(list(dense), set_priority=True):
            if what == "forward":
                with torch.no_grad():
                    output: Tensor = self.model(**self.example)[0]
            else:
                outputs = self.model(**self.example)
                output = outputs[0].detach()
                sum(part.float().square().mean() for part in outputs).backward()
                self.model.zero_grad(set_to_none=True)
        if self.cuda:
            torch.cuda.synchronize()
        return output

    def _let_others(self) -> None:
        if self.cuda:
            torch.cuda.empty_cache()  # other arms are on this GPU too


def compile_blocks(model: Any, how: dict[str, Any]) -> None:
    """Compile what the class says it repeats, each one by itself, as ``compile_repeated_blocks`` does."""
    names = getattr(model, "_repeated_blocks", None) or model._no_split_modules
    for module in model.modules():
        if type(module).__name__ in names:
            module.compile(**how)


def make_float8(model: nn.Module) -> None:
    """Weights of the blocks' linear layers in float8, and their inputs on the way, each row with a scale of its own."""
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())
    quantize_(model, config, filter_fn=lambda module, path: isinstance(module, nn.Linear) and "blocks." in path)


def leave_self_attention_out() -> None:
    """From here on, in this process, self-attention returns its values: what is left is the rest of the model."""
    original = F.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> Tensor:
        if query.shape != key.shape:
            return original(query, key, value, **arguments)
        return value + 0 * (query + key)  # adding nothing of them keeps the work that makes them

    F.scaled_dot_product_attention = attention  # type: ignore[assignment]


def dense_kernels(call: Callable[[], Any]) -> dict[str, int]:
    """How often ``call`` runs each of torch's attention kernels."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    kinds = ("cudnn", "flash", "efficient", "math")
    names = [event.name for event in profile.events() or ()]
    counts = {kind: sum(name.startswith(f"aten::_scaled_dot_product_{kind}") for name in names) for kind in kinds}
    return {kind: count for kind, count in counts.items() if count}


def serve(name: str, model: Published, options: argparse.Namespace, caches: str, asked: Connection) -> None:
    """One arm's process: answer ``(method, what)`` until the other end is closed."""
    import sla_compile

    warnings.simplefilter("ignore", sla_compile.UntrainedGatesWarning)
    for variable in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        os.environ[variable] = str(Path(caches, variable))
    if options.device == "cpu":
        torch.set_num_threads(1)
    arm: Arm | None = None
    with contextlib.suppress(EOFError):
        while True:
            method, what = asked.recv()
            try:
                arm = arm or Arm(name, model, options)
                asked.send(getattr(arm, method)(what))
            except Exception as error:  # the other arms go on
                traceback.print_exc(limit=-3, chain=False)
                lines = str(error).strip().splitlines() or [""]
                asked.send({"failed": f"{type(error).__name__}: {lines[0][:200]}"})
                if options.device == "cuda":
                    torch.cuda.empty_cache()
