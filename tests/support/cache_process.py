"""A process of test_cache_key.py's own: compile a prepared model, and write what came of it as JSON."""

from __future__ import annotations

import importlib
import json
import os
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters

import sla_compile
from tests.support.closeness import relative_error
from tests.support.models import OPTIONS, defined, randomize_gates
from tests.support.processes import leave_guards_untimed


class Attention(nn.Module):
    """An attention and nothing else, so that no C++ is compiled for what stands around it."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attention(q, k, v)


def compile_once(settings: dict[str, object]) -> dict[str, object]:
    """Seconds of the first forward and backward, the largest error against the definition, and the caches' counts."""
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    model = Model()
    q, k, v = (torch.randn(2, 2, 100, 16, requires_grad=True) for _ in range(3))
    sla_compile.prepare(model, (q, k, v), config={**OPTIONS, **settings})
    randomize_gates(model)
    compiled = torch.compile(model, backend="sla")
    start = time.perf_counter()
    output = compiled(q, k, v)
    output.square().mean().backward()
    seconds = time.perf_counter() - start
    with defined(model):
        expected = model(q, k, v)
        leaves = [q, k, v, *model.parameters()]
        wanted = torch.autograd.grad(expected.square().mean(), leaves)
    pairs = [(output, expected), *zip([leaf.grad for leaf in leaves], wanted, strict=True)]
    return {
        "seconds": seconds,
        "error": max(relative_error(actual, right) for actual, right in pairs if actual is not None),
        "norm of dq": q.grad.norm().item() if q.grad is not None else 0.0,
        **{name: counters["aot_autograd"][f"autograd_cache_{name}"] for name in ("hit", "miss", "bypass")},
        **{f"graph {name}": counters["inductor"][f"fxgraph_cache_{name}"] for name in ("hit", "miss", "bypass")},
    }


def main(caches: str, settings: list[dict[str, object]], said: str) -> None:
    """Compile with each of ``settings`` on the folder ``caches``, and write what came of it as JSON to ``said``."""
    warnings.simplefilter("ignore")
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    importlib.import_module("torch._inductor.compile_fx")  # importing the compiler is not compiling
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    leave_guards_untimed()
    torch._inductor.config.fallback_by_default = True  # nor is C++ of what stands around the attention the point
    pick_vec_isa()  # nor is this probe of the CPU, which has seconds of its own with caches that are empty
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = caches
    Path(said).write_text(json.dumps([compile_once(one) for one in settings]))
