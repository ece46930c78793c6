"""Each use of a private PyTorch API, entered once on the installed torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode

from sla_compile import compat
from sla_compile.memory import remember_backend


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).relu()


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + 1


def test_frame_knows_its_code_its_locals_and_the_modules_in_its_graph() -> None:
    seen: dict[str, Any] = {}

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        frame = compat.current_frame()
        assert frame is not None
        stacks = [node.meta.get("nn_module_stack", {}) for node in gm.graph.nodes]
        identities = {int(key.partition("@")[0]) for stack in stacks for key in stack}
        seen.update(
            code=frame.code,
            root=frame.root_module(),
            modules=[frame.module(identity) for identity in identities],
            unknown=frame.module(1),
            resumed=frame.resumed,
        )
        return gm.forward

    model = Outer()
    torch.compile(model, backend=backend)(torch.ones(2, 4))
    assert seen["code"].co_name == "forward"
    assert seen["root"] is model
    assert model.inner in seen["modules"]
    assert seen["unknown"] is None
    assert seen["resumed"] is False


def test_no_frame_outside_dynamo() -> None:
    assert compat.current_frame() is None


def test_restart_traces_the_frame_again() -> None:
    calls = []

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        frame = compat.current_frame()
        assert frame is not None
        calls.append(len(gm.graph.nodes))
        root = frame.root_module()
        assert isinstance(root, Outer)
        if len(calls) == 1:
            root.register_forward_hook(lambda *_: None)
            root.inner.register_forward_hook(lambda module, inputs, output: output * 3)
            frame.restart("a hook was added")
        return gm.forward

    model, x = Outer(), torch.ones(2, 4)
    plain = model.inner(x)
    result = torch.compile(model, backend=backend)(x)
    assert len(calls) == 2
    assert torch.allclose(result, 3 * plain + 1), "the first call already follows the changed model"


def test_root_module_of_a_resumed_frame() -> None:
    class Breaking(Outer):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + 1
            torch._dynamo.graph_break()
            return self.inner(x)

    roots = []

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        frame = compat.current_frame()
        assert frame is not None
        roots.append((frame.resumed, frame.root_module()))
        return gm.forward

    model = Breaking()
    torch.compile(model, backend=backend)(torch.ones(2, 4))
    assert roots == [(False, model), (True, model)]


def test_user_errors_reach_the_caller_as_they_are() -> None:
    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        with compat.user_errors():
            raise ValueError("topk: got 2")

    with pytest.raises(ValueError, match=r"^topk: got 2"):
        torch.compile(Outer(), backend=backend)(torch.ones(2, 4))


def test_a_graph_takes_a_tensor_that_was_not_traced_and_no_guards() -> None:
    seen = []

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        frame = compat.current_frame()
        assert frame is not None
        first = next(iter(gm.graph.nodes)).meta["example_value"]
        seen.append(torch.add(first, compat.traced_like(torch.ones(()), first)))
        model.inner.register_forward_pre_hook(lambda *_: None)
        frame.leave_unguarded()
        return gm.forward

    model, x = Outer(), torch.ones(2, 4)
    compiled = torch.compile(model, backend=backend)
    for inputs in (x, x.double()):
        model.to(inputs.dtype)
        assert torch.equal(compiled(inputs), model(inputs))
    assert len(seen) == 1, "the second call passes for the first"
    assert type(seen[0]) is not torch.Tensor, "a value of the trace"
    assert compat.traced_like(x, x) is x


def test_skipped_as_root_but_inlined() -> None:
    graphs = []

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append([node.target for node in gm.graph.nodes if node.op == "call_function"])
        return gm.forward

    def hook(module: nn.Module, inputs: Any) -> Any:
        return (torch.sin(inputs[0]),)

    compat.skip_as_root_frame(hook)
    model, x = Outer(), torch.ones(2, 4)
    model.register_forward_pre_hook(hook)
    model.inner.register_forward_pre_hook(hook)
    torch.compile(model, backend=backend)(x)
    assert len(graphs) == 1, "the root's own hook is no graph"
    assert torch.sin in graphs[0], "the child's hook is traced"


def test_compiled_siblings_are_those_of_the_same_compile() -> None:
    found = []

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        frame = compat.current_frame()
        assert frame is not None
        root = frame.root_module()
        assert root is not None
        found.append(compat.compiled_siblings(root, frame.compiler))
        return gm.forward

    blocks = [Inner() for _ in range(5)]
    for block in blocks[:2]:
        block.compile(backend=backend)
    wrapped = torch.compile(blocks[2], backend=backend)
    blocks[3].compile(backend="eager")
    blocks[0](torch.ones(2, 4))
    assert {id(module) for module in found[0]} == {id(blocks[1]), id(blocks[2])}
    assert wrapped is not blocks[2]


def test_a_throw_away_compile_leaves_room_in_the_cache() -> None:
    model, x = Outer(), torch.ones(2, 4)
    for _ in range(12):  # above recompile_limit
        with compat.throw_away_compile() as frames:

            def backend(gm: torch.fx.GraphModule, inputs: Any, frames: Any = frames) -> Any:
                frames.append(compat.current_frame())
                return gm.forward

            torch.compile(model, backend=backend)(x)
    calls = []

    def real(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        calls.append(gm)
        return gm.forward

    torch.compile(model, backend=real)(x)
    assert len(calls) == 1, "Dynamo did not take the frame for one that recompiles too often"


def test_a_recompile_limit_is_told() -> None:
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    def mine(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        return gm.forward

    told: list[str] = []
    compat.on_recompile_limit(double.__code__, told.append)
    remember_backend(mine)
    with torch._dynamo.config.patch(recompile_limit=2):
        for backend in ("eager", mine):
            torch._dynamo.reset()
            compiled = torch.compile(double, backend=backend, dynamic=False)
            for size in (3, 4):
                compiled(torch.ones(size))
            assert not told
            compiled(torch.ones(5))
            assert told == (["recompile_limit"] if backend is mine else [])


def test_what_is_compiled_with_other_settings_is_counted_apart() -> None:
    frames: list[Any] = []

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        frame = compat.current_frame()
        assert frame is not None
        frames.append(frame)
        compat.count_apart(frame.code, frame.compiler, "abcddd"[len(frames) - 1])
        return gm.forward

    compiled = torch.compile(Inner(), backend=backend, dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=2):
        for size in range(1, 7):
            compiled(torch.ones(size, 4))
        assert len(frames) == 5, "the third of d is one too many"


def test_code_that_dynamo_gave_up_is_compiled_again() -> None:
    seen: list[bool] = []

    def note() -> None:
        if not torch.compiler.is_compiling():
            seen.append(compat.runs_uncompiled())

    class Watched(Inner):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            note()
            return super().forward(x)

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        assert not compat.running_transform()
        return gm.forward

    remember_backend(backend)
    model, x = Watched(), torch.ones(2, 4)
    compiled = torch.compile(model, backend=backend)
    torch.func.grad(lambda x: compiled(x).sum())(x)
    assert seen == [True]
    compiled(x)
    assert seen == [True]
    model(x)
    torch.compile(model, backend="eager")
    assert seen == [True, False]


def test_what_lets_dynamo_compile_nothing_is_named() -> None:
    named: list[str] = []

    def note(x: torch.Tensor) -> torch.Tensor:
        named.append(compat.no_compile_under())
        return x.sum()

    x = torch.ones(2)
    note(x)
    torch.func.grad(note)(x)
    torch.func.vmap(note)(x[None])
    with FlopCounterMode(display=False):
        note(x)
    assert named == ["", "torch.func.grad", "torch.func.vmap", "FlopCounterMode"]


def test_size_hint_adds_no_guard() -> None:
    hints: list[Any] = []

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        sizes = [n.meta["example_value"] for n in gm.graph.nodes if n.op == "placeholder"]
        hints.extend(compat.size_hint(size) for size in sizes if isinstance(size, torch.SymInt))
        return gm.forward

    compiled = torch.compile(lambda x: x * 2, backend=backend, dynamic=True)
    compiled(torch.ones(7, 3))
    compiled(torch.ones(9, 5))
    assert sorted(hints) == [3, 7]
    assert compat.size_hint(5) == 5


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("L['self'].blocks.0.attn1", "blocks.0.attn1"),
        ("L['self'].__dict__['_modules']['blocks'].0.attn1", "blocks.0.attn1"),
        ("L['self']._modules['blocks']._modules['0']", "blocks.0"),
        ("G['model'].attn", "attn"),
        ("L['self']", ""),
    ],
)
def test_plain_module_path(source: str, path: str) -> None:
    assert compat.plain_module_path(source) == path


def test_conditions_over_the_ranges_of_an_exported_program() -> None:
    shapes = ({0: torch.export.Dim("tokens", min=50, max=100)},)
    ranges = torch.export.export(Outer(), (torch.ones(70, 4),), dynamic_shapes=shapes).range_constraints
    (tokens,) = ranges
    relations = {">= 50": True, ">= 51": False, "< 101": True, "< 100": False, "*2 >= 100": True, "+ 5 >= 56": False}
    for relation, holds in relations.items():
        assert compat.always_holds(f"{tokens} {relation}".replace(" *", "*"), ranges) is holds, relation
    assert compat.always_holds("7 >= 7", ranges)


def test_plain_function_name() -> None:
    """Of the code that really continues a function after a break, and of the function itself."""
    names = []

    def backend(gm: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        frame = compat.current_frame()
        assert frame is not None
        names.append(frame.code.co_name)
        return gm.forward

    def function_at_work(x: torch.Tensor) -> torch.Tensor:
        x = x + 1
        torch._dynamo.graph_break()
        return x * 2

    torch.compile(function_at_work, backend=backend)(torch.zeros(2))
    assert len(set(names)) == 2
    assert {compat.plain_function_name(name) for name in names} == {"function_at_work"}


def test_triton_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's own, or the one that Inductor would make the process use, which it uses from then on."""
    monkeypatch.setenv("TRITON_CACHE_DIR", "/somewhere")
    assert compat.triton_cache_folder(torch.device("cuda", 3)) == "/somewhere"
    monkeypatch.delenv("TRITON_CACHE_DIR")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/inductor")
    assert compat.triton_cache_folder(torch.device("cuda", 3)) == "/inductor/triton/3"
    assert os.environ["TRITON_CACHE_DIR"] == "/inductor/triton/3"


def test_sound_options_are_of_the_versions_that_need_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_MIX_ORDER_REDUCTION", raising=False)
    off = {"triton.mix_order_reduction": False}
    assert [compat.sound_options(version) for version in ("2.11.0+cu130", "2.14.1", "2.15.0")] == [off, off, {}]
    assert set(off) <= set(torch._inductor.list_options())
    monkeypatch.setenv("TORCHINDUCTOR_MIX_ORDER_REDUCTION", "1")
    assert compat.sound_options("2.11.0") == {}


def test_trace_artifact_makes_nothing_where_no_trace_is_written() -> None:
    """That one is written, with its payload, is seen in tests/compiler/test_logs.py."""
    made: list[str] = []

    def payload() -> str:
        made.append("payload")
        return ""

    compat.trace_artifact("sla_test", "string", payload)  # the first of a process finds that none is; Dynamo's, usually
    made.clear()
    compat.trace_artifact("sla_test", "string", payload)
    assert made == []


def test_counters_that_count_already_learn_a_formula() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    packet = torch.ops.aten.sinh
    x = torch.ones(3)
    with FlopCounterMode(display=False) as counter:
        x.sinh()
        compat.count_in_running_counters(packet, lambda *args, out_val: 7)
        x.sinh()
    assert counter.get_flop_counts()["Global"] == {packet: 7}
    with FlopCounterMode(display=False) as later:
        x.sinh()
    assert later.get_total_flops() == 0, "it is of that counter alone"
