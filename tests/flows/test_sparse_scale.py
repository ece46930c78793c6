"""``sparse_scale``: a trainable scale of each head's sparse branch: gates, graphs, files, exports, calibration."""

from __future__ import annotations

import copy
import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import sla_compile
from sla_compile.__main__ import main
from sla_compile.fitting import calibration
from sla_compile.fitting.observer import GatedCall, gated_calls
from sla_compile.fitting.regression import MIN_SCALE, SiteStatistics
from sla_compile.gate import Gate
from sla_compile.gate_settings import GateSpec
from tests.support.capture import Capture
from tests.support.closeness import assert_close, relative_error
from tests.support.models import (
    HEADS,
    MARGINAL,
    WIDTH,
    Attention,
    CalledTwice,
    CheckpointedModel,
    Model,
    TwoAttentions,
    assert_follows_definition,
    defined,
    prepared_model,
    random_input,
    randomize_gates,
)

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "float64")

DIM = WIDTH // HEADS
SCALED = {**MARGINAL, "sparse_scale": True}
GATES = pytest.mark.parametrize("gate", ["shared", "per_head"])
PATHS = ["blocks.0.attention.sla", "blocks.1.attention.sla"]


def made(model: nn.Module | None = None, **options: Any) -> Any:
    """A model (two blocks by default) with gates that have a scale."""
    config = {**SCALED, **options}
    return prepared_model(**config) if model is None else sla_compile.prepare(model, (random_input(),), config=config)


def compiled(model: nn.Module, inner: str = "aot_eager") -> Any:
    return torch.compile(model, backend="sla", options={"inner": inner})


def test_nothing_is_scaled_at_the_start() -> None:
    model, x = made(), random_input()
    plain = sla_compile.prepare(Model(), (x,), config=MARGINAL)
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if ".sla." not in name})
    assert [gate.log_scale.shape for gate in sla_compile.gates(model).values()] == [(HEADS,), (HEADS,)]  # type: ignore
    assert not any(gate.trained() for gate in sla_compile.gates(model).values())
    assert_close("output", compiled(model)(x), compiled(plain)(x), 1e-15)


def test_all_blocks_critical_is_dense_attention() -> None:
    model, x = made(topk=1.0, bottomk=0.0), random_input()
    assert_close("output", compiled(model)(x), model(x), 1e-12)
    with torch.no_grad():
        for gate in sla_compile.gates(model).values():
            gate.log_scale.fill_(0.3)  # type: ignore[union-attr]
    assert relative_error(compiled(model)(x), model(x)) > 1e-2, "the scale is read"


@GATES
@pytest.mark.parametrize("linear", ["marginal", "all", "none"])
def test_output_and_gradients_follow_the_definition(gate: str, linear: str) -> None:
    model, x = made(Model(blocks=1), gate=gate, linear=linear), random_input()
    randomize_gates(model)
    if linear == "none":  # the weight has no gradient
        for site in sla_compile.gates(model).values():
            site.weight.requires_grad_(False)
    assert_follows_definition(compiled(model), model, x)
    if linear == "marginal":  # an argument of the op: what Inductor compiles around it is the same for any
        assert_follows_definition(compiled(model, "inductor"), model, x)


@pytest.mark.parametrize("kind", [TwoAttentions, CalledTwice, CheckpointedModel, Attention])
def test_other_owners(kind: type[nn.Module]) -> None:
    model, x = made(kind()), random_input()
    randomize_gates(model)
    assert_follows_definition(compiled(model), model, x)


def test_unprepared_model_and_settings_of_one_site() -> None:
    model, x = Model(), random_input()
    options = {**MARGINAL, "inner": "aot_eager", "overrides": {"blocks.1.*": {"sparse_scale": True}}}
    run = torch.compile(model, backend="sla", options=options)
    run(x.detach().requires_grad_())
    assert [gate.log_scale is not None for gate in sla_compile.gates(model).values()] == [False, True]
    randomize_gates(model)
    assert_follows_definition(run, model, x)


def test_regional_compile() -> None:
    model, x = made(Model(blocks=3)), random_input()
    randomize_gates(model)
    for block in model.blocks:
        block.compile(backend="sla", options={"inner": "aot_eager"})
    assert_follows_definition(model, model, x)


def test_models_with_and_without_do_not_share_code() -> None:
    x = random_input()
    for config in (MARGINAL, SCALED, MARGINAL):
        model = sla_compile.prepare(Model(), (x,), config=config)
        randomize_gates(model)
        assert_follows_definition(compiled(model), model, x)


def test_symbolic_number_of_tokens() -> None:
    model = made()
    randomize_gates(model)
    run = torch.compile(model, backend="sla", options={"inner": "aot_eager"}, dynamic=True)
    for tokens in (100, 130, 81):
        assert_follows_definition(run, model, random_input(tokens))


def test_run_time_sparsity() -> None:
    model, x = made(max_topk=0.9), random_input()
    randomize_gates(model)
    run = compiled(model)
    for topk in (0.3, 0.8):
        sla_compile.set_sparsity(model, topk=topk)
        assert_follows_definition(run, model, x)


@GATES
def test_a_graph_without_scale_has_no_node_of_it(gate: str) -> None:
    def targets(**options: Any) -> list[str]:
        torch._dynamo.reset()
        capture = Capture(linear="marginal", gate=gate, inner="eager", **options)
        torch.compile(made(Attention(), gate=gate, **options), backend=capture)(random_input())
        assert capture.graph is not None
        return [str(node.target) for node in capture.graph.graph.nodes if node.op != "placeholder"]

    without, scaled = targets(sparse_scale=False), targets()
    added = ["exp", "unsqueeze", "unsqueeze", "neg", "exp", "unsqueeze", "unsqueeze", "mul", "mul", "mul", "type_as"]
    rest = list(scaled)
    for target in added:
        rest.remove(target)
    assert rest == without
    assert not {"exp", "mul", "type_as"} & set(without)


@pytest.mark.parametrize("gates", [torch.float32, torch.bfloat16])
def test_low_precision(gates: torch.dtype) -> None:
    model, x = made(), random_input()
    randomize_gates(model)
    with defined(model), torch.no_grad():
        expected = model(x)
    model = model.bfloat16()
    for gate in sla_compile.gates(model).values():
        gate.to(gates)
    output = compiled(model)(x.bfloat16())
    assert output.dtype == torch.bfloat16
    assert_close("output", output, expected, 0.03)


def test_autocast() -> None:
    model, x = made(), random_input()
    randomize_gates(model)
    with defined(model), torch.no_grad():
        expected = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = compiled(model.float())(x.float())
    assert_close("output", output, expected, 0.03)


def test_copies_pickles_moves_and_detach() -> None:
    model, x = made(), random_input()
    randomize_gates(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        randomize_gates(copied)
        assert_follows_definition(compiled(copied), copied, x)
    names = [name for name, _ in model.named_parameters() if ".sla." in name]
    assert names == [f"{path}.{part}" for path in PATHS for part in ("weight", "bias", "log_scale")]
    assert {*map(id, sla_compile.gate_parameters(model))} == {id(model.get_parameter(name)) for name in names}
    assert "sparse branch scaled by head" in repr(sla_compile.gates(model)[PATHS[0]])
    assert not [name for name, _ in sla_compile.detach(model).named_parameters() if ".sla." in name]


def test_meta() -> None:
    with torch.device("meta"):
        model = Model()
    sla_compile.prepare(model, (random_input().to("meta"),), config=SCALED)
    model.to_empty(device="cpu")
    for gate in sla_compile.gates(model).values():
        gate.log_scale.data.fill_(7.0)  # type: ignore[union-attr]
        gate.reset_parameters()
        assert not gate.trained()
        gate.log_scale.data[0] = 0.1  # type: ignore[union-attr]
        assert gate.trained(), "the scale counts"


@pytest.mark.parametrize("there", [False, True])
def test_prepare_with_the_other_form_is_refused(there: bool) -> None:
    model = made(sparse_scale=there)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    having = "with" if there else "without"
    words = f"{PATHS[0]}: has a gate {having} log_scale, but these settings have sparse_scale={not there}; keep"
    with pytest.raises(ValueError, match=re.escape(words)):
        made(model, sparse_scale=not there)
    with pytest.raises(ValueError, match="contradict its gate"):
        torch.compile(model, backend="sla", options={"linear": "marginal", "sparse_scale": not there})(random_input())
    assert before.keys() == model.state_dict().keys()


def test_save_and_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, x, path = made(), random_input(), tmp_path / "gates.safetensors"
    randomize_gates(model)
    sla_compile.save(model, path)
    fresh = Model()
    fresh.load_state_dict({name: value for name, value in model.state_dict().items() if ".sla." not in name})
    sla_compile.load(fresh, path)
    for name, value in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value), name
    assert_follows_definition(compiled(fresh), fresh, x)
    assert main(["show", str(path)]) == 0
    log_scale = sla_compile.gates(model)[PATHS[0]].log_scale
    assert log_scale is not None
    assert f"scale {log_scale.exp().min():.4g} to" in " ".join(capsys.readouterr().out.split())
    assert main(["show", str(path), "--json"]) == 0
    (first, _) = json.loads(capsys.readouterr().out)["gates"]
    assert first["scale"] == pytest.approx(log_scale.exp().tolist())


@pytest.mark.parametrize("there", [False, True])
def test_a_file_of_the_other_form_is_refused(there: bool, tmp_path: Path) -> None:
    path, model = tmp_path / "gates.safetensors", made(sparse_scale=not there)
    sla_compile.save(made(sparse_scale=there), path)
    with pytest.raises(ValueError, match=f"sparse_scale is {there} in the file, {not there} in the model"):
        sla_compile.load(model, path)
    randomize_gates(model)
    with pytest.raises(RuntimeError, match="Unexpected key" if there else "Missing key"):
        model.load_state_dict(made(sparse_scale=there).state_dict())


def edited(path: Path, *, without: str) -> None:
    """The file at ``path`` with no tensor and no setting called ``without``."""
    with safe_open(path, framework="pt") as opened:
        metadata = opened.metadata()
    sites = json.loads(metadata["sites"])
    config = json.loads(metadata["config"])
    for settings in (config, *(site["config"] for site in sites)):
        settings.pop(without, None)
    tensors = {name: value for name, value in load_file(path).items() if not name.endswith(without)}
    save_file(tensors, path, {**metadata, "sites": json.dumps(sites), "config": json.dumps(config)})


def test_files_of_before_have_no_scale_and_none_may_be_missing(tmp_path: Path) -> None:
    path = tmp_path / "gates.safetensors"
    sla_compile.save(made(sparse_scale=False), path)
    edited(path, without="sparse_scale")
    loaded = sla_compile.load(Model(), path)
    assert [gate.log_scale for gate in sla_compile.gates(loaded).values()] == [None, None]
    sla_compile.save(made(), path)
    edited(path, without="log_scale")
    with pytest.raises(ValueError, match=re.escape(f"{PATHS[0]}.log_scale: missing in the file")):
        sla_compile.load(Model(), path)


def test_state_dict() -> None:
    model, other = made(), made()
    randomize_gates(model)
    state = model.state_dict()
    other.load_state_dict(state)
    assert all(torch.equal(other.state_dict()[name], value) for name, value in state.items())
    with pytest.raises(RuntimeError, match="Missing key"):
        made().load_state_dict({name: v for name, v in state.items() if not name.endswith(("sla.weight", "sla.bias"))})


def test_dense_state_dict_loads_and_projections_leave_the_scale_at_one() -> None:
    model = made(linear="all")
    model.load_state_dict(Model().state_dict())
    randomize_gates(model)
    projections = {}
    for block in range(2):
        projections[f"blocks.{block}.attention.proj_l.weight"] = torch.randn(DIM, DIM)
        projections[f"blocks.{block}.attention.proj_l.bias"] = torch.randn(DIM)
    sla_compile.load_projections(model, projections)
    for gate in sla_compile.gates(model).values():
        assert gate.weight.any()
        assert not gate.log_scale.any()  # type: ignore[union-attr]


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_export(strict: bool) -> None:
    model, x = made(), random_input()
    randomize_gates(model)
    program = sla_compile.export(model, (x,), strict=strict)
    with defined(model):
        expected = model(x)
    assert_close("output", program.module()(x), expected, 1e-10)


def test_report_shows_it() -> None:
    model, x = made(), random_input()
    planned = sla_compile.explain(model, (x,))
    run = compiled(model)
    run(x)
    for report in (planned, sla_compile.report(run)):
        (first, _) = report.sites
        assert first.settings["sparse_scale"] is True
        assert first.gate_parameters == DIM * DIM + DIM + HEADS
        assert any(f"{PATHS[0]}.log_scale" in line for line in first.diff if line.startswith("+ "))
        text = " ".join(str(report).split())
        assert "sparse branch scaled by head" in text
        assert "with scale" in text
    torch._dynamo.reset()
    regional = made()
    regional.blocks[0].compile(backend="sla", options={"inner": "eager"})
    regional(x)
    assert any(f"{PATHS[0]}.log_scale" in line for line in sla_compile.report(regional).sites[0].diff)
    plain = sla_compile.explain(Model(), (x,), config=MARGINAL)
    assert plain.sites[0].settings["sparse_scale"] is False
    assert "scale" not in str(plain.without_diffs())


def random_statistics(gate: Gate, *, spanned: bool = False) -> tuple[SiteStatistics, Tensor, Tensor, Tensor]:
    """Of random branches O^l, O^s and a dense output in which O^s has another share in each head.

    With ``spanned`` the first head's O^s is one that its W and b could give as well.
    """
    linear, sparse, noise = torch.randn(3, 2, gate.heads, 2100, gate.head_dim)
    linear = linear + 0.5 * sparse
    if spanned:
        sparse[:, 0] = linear[:, 0] @ torch.randn(gate.head_dim, gate.head_dim) + 0.2
    shares = torch.linspace(0.3, 0.9, gate.heads)[:, None, None]
    dense = shares * sparse + linear @ torch.randn(gate.head_dim, gate.head_dim) + 0.3 + 0.1 * noise

    class Given(GatedCall):
        def branches(self) -> tuple[Tensor, Tensor | None]:
            return sparse, linear

    statistics = SiteStatistics(gate, linear.device)
    call: Any = {"key_mask": None, "decision": None, "dense": dense}
    statistics.add(Given("site", gate, dense, dense, dense, **call))
    return statistics, linear, sparse, dense


def error_of(gate: list[Tensor], linear: Tensor, sparse: Tensor, dense: Tensor) -> float:
    weight, bias, log_scale = gate
    per_head = weight.dim() == 3
    out = log_scale.exp()[:, None, None] * sparse + linear @ weight.mT + (bias[:, None] if per_head else bias)
    return relative_error(out, dense)


@GATES
@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_closed_form_is_a_minimum_and_its_error_true(gate: str, ridge: float) -> None:
    made_of = Gate(
        GateSpec(heads=3, head_dim=DIM, config=sla_compile.SLAConfig(linear="marginal", gate=gate, sparse_scale=True))
    )
    statistics, *branches = random_statistics(made_of)
    solved = [tensor.requires_grad_() for tensor in statistics.solve(ridge)]
    assert [tensor.shape for tensor in solved] == [parameter.shape for parameter in made_of.parameters()]
    assert abs(statistics.error(*solved) - error_of(solved, *branches)) < 1e-9
    linear = branches[0].transpose(0, 1).reshape(statistics.groups, -1, DIM)
    variance = (linear - linear.mean(1, keepdim=True)).square().sum((1, 2)) / DIM
    penalty = (variance * solved[0].reshape(statistics.groups, -1).square().sum(1)).sum()
    objective = statistics.squared_error(*solved) + ridge * penalty
    gradients = torch.autograd.grad(objective, solved)
    for name, gradient in zip(("weight", "bias", "log_scale"), gradients, strict=True):
        assert gradient.abs().max() < 1e-8 * objective, name
    if ridge == 0:
        assert_close("scale", solved[2].exp(), torch.linspace(0.3, 0.9, 3), 0.02)
        assert statistics.error(*solved[:2], torch.zeros(3)) > 3 * statistics.error(*solved)


def test_a_scale_stays_above_zero() -> None:
    gate = Gate(GateSpec(heads=3, head_dim=DIM, config=sla_compile.SLAConfig(linear="marginal", sparse_scale=True)))
    statistics, *_ = random_statistics(gate)
    statistics.sparse_residual -= statistics.sparse_square * torch.tensor(
        [0.0, 1.5, 0.0]
    )  # O^s of the wrong sign in the second
    scale = statistics.solve(0.01)[2].exp()
    assert scale[1] == pytest.approx(MIN_SCALE)
    assert (scale[[0, 2]] > 0.1).all()


def test_a_sparse_branch_that_is_zero_or_spanned_keeps_its_scale() -> None:
    gate = Gate(GateSpec(heads=2, head_dim=DIM, config=sla_compile.SLAConfig(linear="marginal", sparse_scale=True)))
    statistics, *_ = random_statistics(gate)
    statistics.sparse_cross[0], statistics.sparse_square[0], statistics.sparse_residual[0] = 0, 0, 0
    weight, bias, log_scale = statistics.solve(0.01)
    assert log_scale[0] == 0
    assert log_scale[1] < -0.01
    assert torch.isfinite(weight).all()
    assert torch.isfinite(bias).all()
    gate = Gate(
        GateSpec(
            heads=2, head_dim=DIM, config=sla_compile.SLAConfig(linear="marginal", sparse_scale=True, gate="per_head")
        )
    )
    statistics, *branches = random_statistics(gate, spanned=True)
    solved = [*statistics.solve(0.0)]
    assert solved[2][0] == 0, "rounding alone would decide"
    assert solved[2][1].exp() == pytest.approx(0.9, abs=0.02)
    assert error_of(solved, *branches) < 0.1


def diffuse(blocks: int = 2) -> Model:
    """A model whose softmax is nearly even, so that critical blocks have little of its mass, and values with a mean."""
    model = Model(blocks).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.attention.qkv.weight[: 2 * WIDTH] *= 0.5
    return model


@GATES
@pytest.mark.parametrize("linear", ["marginal", "none"])
@pytest.mark.parametrize("sequential", [False, True])
def test_calibration_closes_more_with_it(gate: str, linear: str, sequential: bool) -> None:
    data = [(random_input(),) for _ in range(3)]
    weights = diffuse().state_dict()
    closed = {}
    for scaled in (False, True):
        model = diffuse()
        model.load_state_dict(weights)
        made(model, sparse_scale=scaled, gate=gate, linear=linear, topk=0.15)
        report = sla_compile.calibrate(model, data, sequential=sequential)
        closed[scaled] = calibration.mean_error(report.sites, "closed")
        if scaled:
            first = report.sites[0]
            scales = [s for g in sla_compile.gates(model).values() for s in g.log_scale.exp().tolist()]  # type: ignore
            assert max(scales) < 0.8, "too large by 1 / critical mass"
            assert sla_compile.calibrate(model, data, sequential=sequential).sites[0].before == first.after
    assert closed[True] > closed[False] + 0.15, closed


@GATES
def test_what_is_calibrated_is_what_is_computed(gate: str) -> None:
    model, data = made(diffuse(1), gate=gate), [(random_input(),) for _ in range(2)]
    report = sla_compile.calibrate(model, data)
    pairs: list[tuple[Tensor, Tensor]] = []

    def compare(call: GatedCall) -> Tensor:
        pairs.append((call.output_with_gate(*call.gate.parameters()), call.dense))
        return call.dense

    with torch.no_grad(), gated_calls(model, compare):
        for args in data:
            model(*args)
    outs, denses = (torch.cat(list(part)) for part in zip(*pairs, strict=True))
    assert abs(relative_error(outs, denses) - report.sites[0].after) < 1e-9
    inside = model.get_submodule("blocks.0.attention.out")
    read: list[Tensor] = []
    inside.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    with torch.no_grad():
        compiled(model)(*data[0])
    assert_close("compiled", read[0].unflatten(2, (HEADS, DIM)).transpose(1, 2), pairs[0][0], 1e-10)


@pytest.mark.parametrize("loss", ["attention", "output"])
def test_distill_trains_it(loss: Any) -> None:
    model, data = made(diffuse()), [(random_input(),) for _ in range(2)]
    options: dict[str, Any] = {"compile_options": {"inner": "aot_eager"}} if loss == "output" else {}
    report = sla_compile.distill(model, data, steps=30, lr=0.05, loss=loss, **options)
    assert report.losses[-1] < 0.95 * report.losses[0]
    for gate in sla_compile.gates(model).values():
        assert gate.log_scale is not None
        assert (gate.log_scale < -0.01).any()


def test_allocate_reads_it() -> None:
    model, data = made(diffuse()), [(random_input(),)]
    with torch.no_grad():
        for gate in sla_compile.gates(model).values():
            gate.log_scale.fill_(-0.5)  # type: ignore[union-attr]
    scaled = sla_compile.allocate(copy.deepcopy(model), data, budget=0.3).to_dict()["sites"][0]
    with torch.no_grad():
        for gate in sla_compile.gates(model).values():
            gate.log_scale.zero_()  # type: ignore[union-attr]
    assert scaled != sla_compile.allocate(model, data, budget=0.3).to_dict()["sites"][0]


class Video(nn.Module):
    """Tokens of a (2, 8, 8) grid, with nothing before the attention but its projection."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x)


def test_reordered_tokens_still_move_out_of_the_attention() -> None:
    config = {**SCALED, "reorder": "tiles", "grid": (2, 8, 8), "inner": "eager"}
    x, model = random_input(128), Video()
    sla_compile.prepare(model, (x,), config=config)
    randomize_gates(model)
    capture = Capture(**config)
    moved = torch.compile(model, backend=capture)(x)
    assert capture.graph is not None
    nodes = list(capture.graph.graph.nodes)
    reorders = [i for i, node in enumerate(nodes) if node.target is torch.ops.sla.reorder.default]
    names = [getattr(node.target, "__name__", str(node.target)) for node in nodes]
    linears = [i for i, name in enumerate(names) if name == "linear"]
    assert len(reorders) == 2
    assert reorders[0] < linears[0] < linears[1] < reorders[1]
    out = torch.empty(0)

    def gated(call: GatedCall) -> Tensor:
        nonlocal out
        out = call.output_with_gate(*call.gate.parameters())
        return out

    with torch.no_grad(), gated_calls(model, gated):
        assert_close("output", moved, model(x), 1e-10)
    assert out.numel()


def test_head_scales_fold_into_the_output_projection() -> None:
    """s O^s + O^l W^T + b is P' (O^s + O^l (W / s)^T + b / s) with s in the columns of P'."""
    q, k, v = torch.randn(3, 1, HEADS, 96, DIM)
    weight, bias, scale = torch.randn(HEADS, DIM, DIM), torch.randn(HEADS, DIM), torch.tensor([0.4, 0.9])
    projection = torch.randn(WIDTH, WIDTH)
    options = {name: MARGINAL[name] for name in ("topk", "bottomk", "block_q", "block_k", "linear")}
    sparse = sla_compile.sparse_linear_attention(q, k, v, **options)
    rest = sla_compile.sparse_linear_attention(q, k, v, weight, bias, **options) - sparse
    expected = F.linear((scale[:, None, None] * sparse + rest).transpose(1, 2).flatten(2), projection)
    inside = weight / scale[:, None, None], bias / scale[:, None]
    folded = sla_compile.sparse_linear_attention(q, k, v, *inside, **options).transpose(1, 2).flatten(2)
    assert_close("output", F.linear(folded, projection * scale.repeat_interleave(DIM)), expected, 1e-12)
