"""Attention that is no call of F.scaled_dot_product_attention is fitted as its twin that is; and how it is traced."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import sla_compile
from sla_compile import sharded
from sla_compile.fitting import traced_calls
from sla_compile.fitting.observer import GatedCall, gated_calls, no_gated_call_message
from tests.support import random_programs
from tests.support.calibration import assert_same_state, batches, made, recorded, state
from tests.support.closeness import relative_error
from tests.support.models import HEADS, MARGINAL, WIDTH, Attention, Model, random_input, randomize_gates

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
sdpa = F.scaled_dot_product_attention


def by_hand(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores + mask if mask.is_floating_point() else scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1) @ v


def first_head(x: Tensor) -> Tensor:
    return x[:, :1]


def for_each_head(x: Tensor) -> Tensor:
    return x[:, :1, None].expand(-1, -1, HEADS, -1, -1).flatten(1, 2)


def most(q: Tensor) -> Tensor:
    """(B, N): all tokens but the last ten, of the second item the last twenty."""
    return torch.arange(q.shape[2]) < q.shape[2] - 10 * torch.arange(1, len(q) + 1)[:, None]


def over_keys(q: Tensor) -> Tensor:
    return most(q)[:, None, None]


def added(q: Tensor) -> Tensor:
    return torch.linspace(-2, 2, q.shape[2], dtype=q.dtype)[None, None, None]


def over_both(q: Tensor) -> Tensor:
    return most(q)[:, None, None] & most(q)[:, None, :, None]


def halves(q: Tensor) -> Tensor:
    second = torch.arange(q.shape[2]) >= 60
    return second[:, None] == second


@functools.wraps(random_programs.flash_attn_func)
def flash_attn_func(*args: Any, **kwargs: Any) -> Tensor:
    """A stand-in for that of flash-attn in which a mode sees no call."""
    with torch._C.DisableTorchFunction():
        return random_programs.flash_attn_func(*args, **kwargs)


torch._dynamo.allow_in_graph(flash_attn_func)


def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


TILES: dict[str, Any] = {"reorder": "tiles", "grid": (4, 5, 5)}
compiled: Attend = torch.compile(by_hand, backend="eager")

TWINS: dict[str, tuple[Attend, Attend, dict[str, Any]]] = {
    # As a call, as something else, and settings.
    "tiles": (sdpa, by_hand, TILES),
    "grouped heads, in tiles": (
        lambda q, k, v: sdpa(q, first_head(k), first_head(v), enable_gqa=True),
        lambda q, k, v: by_hand(q, for_each_head(k), for_each_head(v)),
        TILES,
    ),
    "masked keys, in tiles": (
        lambda q, k, v: sdpa(q, k, v, over_keys(q)),
        lambda q, k, v: by_hand(q, k, v, over_keys(q)),
        TILES,
    ),
    "added to the scores": (
        lambda q, k, v: sdpa(q, k, v, added(q)),
        lambda q, k, v: by_hand(q, k, v, added(q)),
        {"sparse_scale": True},
    ),
    "masked queries": (
        lambda q, k, v: sdpa(q, k, v, over_both(q)),
        lambda q, k, v: by_hand(q, k, v, over_both(q)).nan_to_num(),
        {},
    ),
    "masked queries, in tiles": (
        lambda q, k, v: sdpa(q, k, v, over_both(q)),
        lambda q, k, v: by_hand(q, k, v, over_both(q)).nan_to_num(),
        TILES,
    ),
    "runs of queries": (
        lambda q, k, v: sdpa(q, k, v, halves(q)),
        lambda q, k, v: by_hand(q, k, v, halves(q)),
        {},
    ),
    "flash-attn": (sdpa, flash, {}),
    "a compiled function": (sdpa, compiled, {"gate": "per_head"}),
}


class Attending(Attention):
    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attend = attend

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attend(*self.heads(x)).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("form", TWINS)
def test_attention_that_is_no_call_is_fitted_as_one_that_is(form: str) -> None:
    call, other, options = TWINS[form]
    data = batches(2)
    found = []
    model = Attending(call)
    for attend in (call, other):
        each = copy.deepcopy(model)
        each.attend = attend
        each = made(nn.Sequential(each), max_topk=0.9, topk_by="head", **options)
        (calls,) = recorded(each, data[:1]).values()
        report = sla_compile.calibrate(each, data, held_back=0)
        found.append((calls, [site.after for site in report.sites], list(sla_compile.gate_parameters(each))))
        patterns = {gate.pattern for gate in sla_compile.gates(each).values()}
        assert (patterns == {"scaled_dot_product_attention"}) is (attend is sdpa or attend is call)
    for one, two in zip(found[0][0], found[1][0], strict=True):
        for name in ("query", "key", "value", "dense"):
            assert relative_error(getattr(two, name), getattr(one, name)) < 1e-12, name
        assert relative_error(two.output_with_sparsity(0.4, 0.0), one.output_with_sparsity(0.4, 0.0)) < 1e-12
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-9)
    for of_call, of_other in zip(found[0][2], found[1][2], strict=True):
        assert of_call.norm() > 0
        assert (of_call - of_other).norm() <= 1e-9 * of_call.norm()


class Padded(nn.Module):
    """Two attentions with a graph break between them, one of them checkpointed."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.first, self.second = Attending(attend), Attending(attend)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        torch._dynamo.graph_break()
        return x + checkpoint(self.second, x, use_reentrant=False)


def of_padded(attend: Callable[..., Tensor]) -> Attend:
    return lambda q, k, v: attend(q, k, v, over_keys(q))


@pytest.mark.parametrize(
    ("kind", "call", "other", "linear"),
    [(Model, sdpa, by_hand, "taylor"), (Padded, of_padded(sdpa), of_padded(by_hand), "marginal")],
    ids=["plain", "masked, with a graph break"],
)
def test_each_head_is_given_the_same_topk(kind: Any, call: Attend, other: Attend, linear: str) -> None:
    data, found = batches(3), []
    model: Any = Padded(call)
    if kind is Model:
        model = Model()
        for block in model.blocks:
            block.attention = Attending(call)
    for attend in (call, other):
        each = copy.deepcopy(model)
        for module in each.modules():
            if isinstance(module, Attending):
                module.attend = attend
        made(each, linear=linear, max_topk=0.9, topk_by="head")
        report = sla_compile.allocate(each, data, budget=0.4, ladder=(0.5, 1.0, 1.5))
        fitted = sla_compile.calibrate(each, data)
        found.append(([site.topks for site in report.sites], [site.after for site in fitted.sites], each))
        assert "forward" not in each.__dict__, "the model's own forward is back"
    (topks, errors, first), (other_topks, other_errors, second) = found
    assert topks == other_topks
    assert len(topks) == 2
    assert errors == pytest.approx(other_errors, rel=1e-9)
    for one, two in zip(sla_compile.gate_parameters(first), sla_compile.gate_parameters(second), strict=True):
        assert (one - two).norm() <= 1e-9 * one.norm()


def test_what_is_distilled_is_what_runs_compiled() -> None:
    """Attention of nn.MultiheadAttention: gradients reach the gates, and the compiled model gives what was fitted."""

    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.attention(x, x, x, need_weights=False)[0]
            return out

    model, data = made(Module()), batches(2)
    report = sla_compile.distill(model, data, steps=12, lr=2e-2)
    assert report.losses[-1] < report.losses[0]
    assert all(gate.trained() for gate in sla_compile.gates(model).values())
    seen = {}

    def record(call: GatedCall) -> Tensor:
        seen[call.path] = call.output_with_gate(*call.gate.parameters())
        return seen[call.path]

    with torch.no_grad(), gated_calls(model, record):
        observed = model(*data[0])
    assert list(seen) == ["attention.sla"]
    compiled = torch.compile(model, backend="sla", options={"inner": "eager"})
    assert relative_error(observed, compiled(*data[0])) < 1e-12


class WithOneKept(Attention):
    """Called as often as it has gates: one attention by hand, one call that has a gate, one that is kept."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        first = (q @ k.transpose(-2, -1) * 0.25).softmax(-1) @ v
        second = F.scaled_dot_product_attention(q, k, 2 * v)
        third = F.scaled_dot_product_attention(q, k, v, q.new_ones(x.shape[1], x.shape[1]).tril())
        return self.out((first + second + third).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("from_a_file", [False, True])
def test_an_owner_that_mixes_in_attention_written_by_hand(from_a_file: bool, tmp_path: Path) -> None:
    """The compiler counts both kinds, and so does this: each gate gets its own attention."""
    model = nn.Sequential(WithOneKept()).double()
    data = [(random_input(),)]
    sla_compile.prepare(model, data[0], config=MARGINAL)
    assert [gate.pattern for gate in sla_compile.gates(model).values()] == [
        "scaled_matmul_softmax_matmul",
        "scaled_dot_product_attention",
    ]
    if from_a_file:
        sla_compile.save(model, tmp_path / "gates.safetensors")
        model = nn.Sequential(WithOneKept()).double()
        sla_compile.load(model, tmp_path / "gates.safetensors")
    calls = recorded(model, data)
    assert {path: len(found) for path, found in calls.items()} == {"0.sla": 1, "0.sla_1": 1}
    by_hand, call = calls["0.sla"][0], calls["0.sla_1"][0]
    assert torch.equal(call.value, 2 * by_hand.value)
    assert relative_error(call.dense, 2 * by_hand.dense) < 1e-12  # a head has 16 numbers: 0.25 is the usual scale
    report = sla_compile.calibrate(model, data, held_back=0)
    assert [site.path for site in report.sites] == ["0.sla", "0.sla_1"]
    assert all(site.after < site.before for site in report.sites)


def test_gates_of_a_file_find_attention_however_it_is_written_by_now(tmp_path: Path) -> None:
    first: Any = made(nn.Sequential(Attending(sdpa)))
    data = batches(2)
    sla_compile.save(first, tmp_path / "gates.safetensors")
    errors = []
    for attend in (sdpa, by_hand):
        model: Any = copy.deepcopy(sla_compile.detach(first))
        model[0].attend = attend
        sla_compile.load(model, tmp_path / "gates.safetensors")
        errors.append([site.after for site in sla_compile.calibrate(model, data).sites])
        assert len(errors[-1]) == 1
    assert errors[0] == pytest.approx(errors[1], rel=1e-9)


def untraceable(module: nn.Module, args: Any) -> None:
    torch._dynamo.graph_break()


def test_graphs_that_begin_at_the_owners() -> None:
    """As where something that is not traced, a hook of fully_shard say, stands before each: they share their code."""
    model = made(nn.Sequential(Attending(by_hand), Attending(by_hand)))
    randomize_gates(model)
    data = batches(1)
    expected = {path: call.output_with_gate(*call.gate.parameters()) for path, (call,) in recorded(model, data).items()}
    for owner in model:
        owner.register_forward_pre_hook(untraceable)
    before, seen = state(model), {}
    for path, (call,) in recorded(model, data).items():
        seen[path] = call.output_with_gate(*call.gate.parameters())
    assert seen.keys() == expected.keys() == {"0.sla", "1.sla"}
    assert all(relative_error(seen[path], expected[path]) < 1e-12 for path in seen)
    assert_same_state(state(model), before)


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("attend", [sdpa, by_hand])
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
def test_gates_in_fully_shard_keep_their_fit(attend: Attend, one_rank: None) -> None:
    data, model = batches(2), made(nn.Sequential(Attending(attend), Attending(attend)))
    plain, whole, parts = (copy.deepcopy(model) for _ in range(3))
    mesh = init_device_mesh("cpu", (1,))
    for module in (*parts, parts, whole):
        fully_shard(module, mesh=mesh)
    sla_compile.calibrate(plain, data)
    wanted = list(sla_compile.gate_parameters(plain))
    assert any(parameter.norm() > 0 for parameter in wanted)
    for wrapped in (whole, parts):
        sla_compile.calibrate(wrapped, data)
        sharded.reshard(wrapped)
        for parameter, expected in zip(sla_compile.gate_parameters(wrapped), wanted, strict=True):
            assert torch.equal(sharded.whole(parameter), expected)
    with pytest.raises(ValueError, match=r"0\.sla: got a gate in fully_shard with a topk that is compiled in"):
        sla_compile.allocate(parts, data)
    assert "no trace says why" in no_gated_call_message(parts, (data[0], {}))


def test_a_fit_traces_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = made(nn.Sequential(Attending(by_hand))), batches(2)
    frames: list[str] = []
    of_backend = traced_calls._Backend.__call__

    def counted(backend: Any, gm: Any, inputs: Any) -> Any:
        frames.append(next(iter(inputs)).__class__.__name__)
        return of_backend(backend, gm, inputs)

    monkeypatch.setattr(traced_calls._Backend, "__call__", counted)
    sla_compile.calibrate(model, data)
    assert len(frames) == 1
    report = sla_compile.distill(model, data, steps=4)
    assert (len(report.losses), len(frames)) == (4, 3)  # what requires gradients is another for its steps
    assert not traced_calls._KEPT


def test_between_two_uses_of_a_trace_the_model_is_its_own() -> None:
    model, data = made(nn.Sequential(Attending(by_hand))), batches(1)
    compiled = torch.compile(model, backend="sla", options={"inner": "eager"})
    sparse, dense = compiled(*data[0]), model(*data[0])
    with traced_calls.kept_traces(model):
        for _ in range(2):
            assert len(recorded(model, data)) == 1
            assert torch.equal(model(*data[0]), dense)
            assert torch.equal(compiled(*data[0]), sparse)
            assert "forward" not in model.__dict__


def test_a_gate_that_is_not_its_parameters_is_refused() -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    model, data = made(nn.Sequential(Attending(by_hand))), batches(1)
    parametrize.register_parametrization(model[0].sla, "weight", Doubled())
    with pytest.raises(ValueError, match=r"0\.sla: .* is no parameter of these gates; accepted: gates whose tensors"):
        recorded(model, data)
    assert "forward" not in model.__dict__
