"""What the call site of an attention is, in a traced graph and in a running model."""

from __future__ import annotations

import functools
import importlib.util
import linecache
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from sla_compile.compat import Frame, current_frame
from sla_compile.compiler.call_sites import call_site, running_frames, traced_frames
from sla_compile.passes.find_attention import SDPA_TARGETS, find_attention
from tests.support.models import Attention, CalledTwice, Doubled, Model, TwoAttentions, random_input

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "float64")

with_columns = pytest.mark.skipif(sys.version_info < (3, 11), reason="no columns before Python 3.11")


def traced(model: nn.Module, *inputs: Any) -> list[str]:
    """The call sites in the graphs that Dynamo traces."""
    found = []

    def backend(gm: fx.GraphModule, _: Sequence[Tensor]) -> Callable[..., Any]:
        frame = current_frame()
        assert isinstance(frame, Frame)
        for call in find_attention(gm):
            levels = [frame.root_module(), *(frame.module(level.identity) for level in call.stack)]
            modules = [module for module in levels if module is not None]
            found.append(call_site(traced_frames(call.node.stack_trace or ""), modules))
        return gm.forward

    torch.compile(model, backend=backend)(*inputs)
    return found


def running(model: nn.Module, *inputs: Any) -> list[str]:
    """The call sites of ``scaled_dot_product_attention`` while the model runs."""
    found = []
    modules: list[nn.Module] = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in SDPA_TARGETS:
                found.append(call_site(running_frames(sys._getframe(1)), modules))
            return func(*args, **(kwargs or {}))

    handles = [
        handle
        for module in model.modules()
        for handle in (
            module.register_forward_pre_hook(lambda module, _: modules.append(module)),
            module.register_forward_hook(lambda *_: modules.pop() and None),
        )
    ]
    with Mode():
        model(*inputs)
    for handle in handles:
        handle.remove()
    return found


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(
        q, k, v
    )  # fmt: skip


class Chunks(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        y = torch.cat([F.scaled_dot_product_attention(q[i : i + 1], k[i : i + 1], v[i : i + 1]) for i in range(len(x))])
        for i in range(2):
            y = y + attend(q, k * i, v)
        return self.out(y.transpose(1, 2).flatten(2))


class OneLine(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        y = attend(q, k, v) + attend(q, 2 * k, v)
        return self.out(y.transpose(1, 2).flatten(2))


def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any) -> Any:
        return function(*args)

    return wrapper


class Wrapped(Attention):
    @wrapped
    def forward(self, x: Tensor) -> Tensor:
        return Attention.forward(self, x)


class Broken(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        y = attend(q, k, v)
        torch._dynamo.graph_break()
        return self.out(attend(q, k, v + y).transpose(1, 2).flatten(2))


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = TwoAttentions()

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.attention, x, use_reentrant=False)
        return self.attention(x)


class TorchsOwn(nn.Module):
    """Modules of PyTorch, whose lines a trace leaves out: they have one attention each."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 2, batch_first=True)
        self.inner = nn.Sequential(Attention())

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.attention(x, x, x, need_weights=False)[0])


CASES: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "one attention": (Attention, ["forward+2:4"]),
    "below a model": (lambda: Model(1), ["forward+2:4"]),
    "two lines": (TwoAttentions, ["forward+2:8", "forward+4:16"]),
    "a module called twice": (CalledTwice, ["forward+2:4"]),
    "loops": (Chunks, ["forward+2:15", "forward+4:8 > attend+1:7"]),
    "one line": (OneLine, ["forward+2:4 > attend+1:7", "forward+2:22 > attend+1:7"]),
    "a wrapped forward": (lambda: Doubled(Wrapped()), ["forward+1:7 > forward+2:4"]),
    "a graph break": (Broken, ["forward+2:4 > attend+1:7", "forward+4:16 > attend+1:7"]),
    "a checkpoint": (Checkpointed, ["forward+2:8", "forward+4:16"]),
}


@with_columns
@pytest.mark.parametrize("case", CASES)
def test_it_is_the_same_in_a_trace_and_in_a_run(case: str) -> None:
    made, expected = CASES[case]
    model, x = made(), random_input()
    assert list(dict.fromkeys(running(model, x))) == expected
    assert list(dict.fromkeys(traced(model, x))) == expected


def test_the_lines_of_pytorchs_own_modules_do_not_count() -> None:
    assert [site.partition(":")[0] for site in traced(TorchsOwn(), random_input())] == ["forward", "forward+2"]


SOURCE = """
import torch.nn.functional as F
from torch import nn

class Attention(nn.Module):
    def forward(self, x):
        x = x.unflatten(-1, (2, 16)).transpose(1, 2)

        def helper(q):
            return F.scaled_dot_product_attention(q, x, x)

        return helper(x)
"""


def module_of(source: str, path: Path) -> ModuleType:
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("edit", ["elsewhere", "the folder", "deeper", "no source", "while it runs"])
def test_edits_elsewhere_leave_it(edit: str, tmp_path: Path) -> None:
    before = traced(module_of(SOURCE, tmp_path / "attention.py").Attention(), random_input())
    source, path = SOURCE, tmp_path / "other.py"
    if edit == "elsewhere":
        source = "import math\n\nX = 1\n" + SOURCE.replace("class", "def forward():\n    pass\n\nclass") + "\nY = 2\n"
    elif edit == "the folder":
        (tmp_path / "folder").mkdir()
        path = tmp_path / "folder" / "attention.py"
    elif edit == "deeper":
        source = SOURCE.replace("class Att", "if True:\n  class Att").replace("\n    ", "\n      ")
    module = module_of(source, path)
    model = module.Attention()
    if edit == "no source":
        path.unlink()
        (only,) = traced(model, random_input())
        assert only.startswith("forward+"), "absolute lines then, which still tell call sites apart"
        return
    assert traced(model, random_input()) == before
    if edit == "while it runs":
        path.write_text("# a comment\n" * 9 + SOURCE)
        torch._dynamo.reset()
        linecache.checkcache()
        assert traced(model, random_input()) == before
