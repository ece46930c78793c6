"""choose_orders: the token order of each attention from data; errors by the definition."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sla_compile
from sla_compile.compiler import preparation
from sla_compile.fitting.observer import GatedCall, gated_calls
from sla_compile.fitting.order_errors import Errors, best_orders
from sla_compile.kernels import reference
from tests.support.models import HEADS, OPTIONS, WIDTH, Attention, Model, SomeBlocks, TwoAttentions

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "float64")

GRID = (8, 4, 16)
SETTINGS: dict[str, Any] = {**OPTIONS, "bottomk": 0.0, "linear": "taylor", "topk": 0.1, "grid": GRID, "inner": "eager"}
HALF = WIDTH // HEADS // 2
TRIED = ("raster", "tiles:1", "tiles:8")


def refused(*parts: str) -> Any:
    return pytest.raises(ValueError, match="(?s)" + ".*".join(re.escape(part) for part in parts))


def batches(count: int = 2) -> list[tuple[Tensor]]:
    """Of each head half of the channels say in which frame and row a token is, the other half in which column."""
    frames, rows, columns = GRID
    found = []
    for _ in range(count):
        row = torch.randn(frames, rows, 1, HALF).expand(*GRID, HALF)
        place = torch.randn(1, 1, columns, HALF).expand(*GRID, HALF)
        found.append((torch.cat([row, place] * HEADS, dim=-1).reshape(1, -1, WIDTH),))
    return found


def looking(*halves: int | tuple[int, ...]) -> Model:
    """A block, or each of its heads, attends to the tokens of its own frame and row (0) or of its own column (1)."""
    model = Model(len(halves))
    for block, half in zip(model.blocks, halves, strict=True):
        seen = torch.zeros(HEADS, 2, HALF)
        seen[torch.arange(HEADS), torch.tensor(half)] = 1.0
        with torch.no_grad():
            query, key, _ = block.attention.qkv.weight.view(3, WIDTH, WIDTH)
            query.copy_(4.0 * torch.diag(seen.flatten()))
            key.copy_(torch.diag(seen.flatten()))
            block.attention.qkv.bias.zero_()
            block.attention.out.weight.mul_(0.1)
    return model


def prepared(model: nn.Module, **settings: Any) -> Any:
    return sla_compile.prepare(model, batches()[0], config={**SETTINGS, **settings})


def orders(model: nn.Module) -> list[str]:
    return [gate.config.reorder for gate in sla_compile.gates(model).values()]


def errors(model: nn.Module, data: list[tuple[Tensor]]) -> dict[str, float]:
    """||O - dense|| / ||dense|| at each attention with the order that it has, by the definition."""
    sums: dict[str, list[float]] = {}

    def observe(call: GatedCall) -> Tensor:
        told = {name: getattr(call.gate.config, name) for name in ("topk", "bottomk", "block_q", "block_k", "linear")}
        shift = None if call.gate.shift is None else call.gate.shift.detach()
        out = reference.sparse_linear_attention(call.query, call.key, call.value, None, None, shift=shift, **told)
        wanted = torch.nn.functional.scaled_dot_product_attention(call.query, call.key, call.value)
        total = sums.setdefault(call.path, [0.0, 0.0])
        total[0] += (out - wanted).square().sum().item()
        total[1] += wanted.square().sum().item()
        return call.dense

    with gated_calls(model, observe), torch.no_grad():
        for batch in data:
            model(*batch)
    return {path: math.sqrt(a / b) for path, (a, b) in sums.items()}


def test_each_attention_gets_the_order_that_suits_it() -> None:
    model, data = prepared(looking(1, 0)), batches()
    with torch.no_grad():
        for parameter in sla_compile.gate_parameters(model):
            parameter.fill_(0.125)
    report = sla_compile.choose_orders(model, iter(data), orders=TRIED)
    assert orders(model) == ["tiles:8", "raster"]
    assert [site.order for site in report.sites] == ["tiles:8", "raster"]
    assert {site.order_before for site in report.sites} == {"raster"}
    assert report.output < 0.9 * report.output_before
    assert (report.batches, report.orders) == (2, TRIED)
    assert all(bool((parameter == 0.125).all()) for parameter in sla_compile.gate_parameters(model))
    for site in report.sites:
        assert set(site.errors) == set(TRIED)
        assert site.error == min(site.errors.values())
    for order in TRIED:
        again = prepared(model, reorder=order)
        for path, error in errors(again, data).items():
            (site,) = (site for site in report.sites if site.path == path)
            assert site.errors[order] == pytest.approx(error, rel=1e-9)
    assert report.to_dict()["sites"][0]["errors"] == dict(report.sites[0].errors)
    assert "[0." in str(report)
    assert "blocks.1.attention.sla" in str(report)


def test_each_head_gets_the_order_that_suits_it() -> None:
    """The first head of the first attention looks along time, its second within a row; of the other both look along."""
    model, data = prepared(looking((1, 0), 1)), batches()
    report = sla_compile.choose_orders(model, iter(data), orders=TRIED, by="head")
    assert orders(model) == [site.order for site in report.sites] == ["tiles:8,raster", "tiles:8"]
    mixed, alike = report.sites
    assert set(mixed.errors) == {*TRIED, "tiles:8,raster"}
    assert set(alike.errors) == set(TRIED)
    assert mixed.error == min(mixed.errors.values()) < 0.9 * min(mixed.errors[order] for order in TRIED)
    for path, error in errors(model, data).items():
        (site,) = (site for site in report.sites if site.path == path)
        assert site.error == pytest.approx(error, rel=1e-9)
    assert f"[{mixed.error:.4f}]" in str(report)
    other = prepared(looking((1, 0), 1), overrides=report.overrides)
    torch.compile(other, backend="sla")(*data[0])
    assert [site.order["kind"] for site in sla_compile.report(other).sites] == ["tiles:8,raster", "tiles:8"]


class Masked(Attention):
    """With a mask that leaves out nothing."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        mask = torch.ones(len(x), 1, 1, x.shape[1], dtype=torch.bool, device=x.device)
        return self.out(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("by", ["site", "head"])
def test_the_model_is_traced_once_for_all_orders(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And once with the best, and once before to see that the first batch reaches every gate."""
    model, traced = prepared(looking((1, 0), 1)), []
    trace = preparation.dry_run

    def counted(*arguments: Any) -> preparation.DryRun:
        traced.append(arguments)
        return trace(*arguments)

    monkeypatch.setattr(preparation, "dry_run", counted)
    report = sla_compile.choose_orders(model, batches(), orders=TRIED, by=by)
    assert report.output < report.output_before
    assert len(traced) == 3


def test_what_cannot_have_an_order_for_each_head_gets_one_for_all() -> None:
    model = looking((1, 0))
    masked = Masked()
    masked.load_state_dict(model.blocks[0].attention.state_dict())
    model.blocks[0].attention = masked
    report = sla_compile.choose_orders(model, batches(), orders=TRIED, config=SETTINGS, by="head")
    assert orders(model)[0] in TRIED
    assert set(report.sites[0].errors) == set(TRIED)
    assert report.sites[0].error == min(report.sites[0].errors.values())


def test_another_process_prepares_the_model_with_the_overrides() -> None:
    model = prepared(looking(1, 0))
    report = sla_compile.choose_orders(model, batches(), orders=TRIED)
    other = prepared(looking(1, 0), overrides=report.overrides)
    assert orders(other) == orders(model) == ["tiles:8", "raster"]
    compiled = torch.compile(other, backend="sla")
    compiled(*batches()[0])
    kinds = [site.order and site.order["kind"] for site in sla_compile.report(other).sites]
    assert kinds == ["tiles:8", "raster"]


def test_other_settings_of_a_module_stay() -> None:
    overrides = {"*.attention": {"topk": 0.2}, "blocks.0.attention": {"block_q": 32, "reorder": "hilbert"}}
    model = prepared(looking(1, 1), overrides=overrides)
    sla_compile.choose_orders(model, batches(), orders=TRIED)
    first, second = (gate.config for gate in sla_compile.gates(model).values())
    assert (first.topk, first.block_q, first.reorder) == (0.2, 32, "tiles:8")
    assert (second.topk, second.block_q, second.reorder) == (0.2, 16, "tiles:8")


def test_orders_that_bring_the_output_no_nearer_are_not_taken() -> None:
    model = prepared(looking(0, 0))
    before = sla_compile.gates(model)["blocks.0.attention.sla"].model_config
    report = sla_compile.choose_orders(model, batches(), orders=["tiles:8"])
    assert orders(model) == ["raster", "raster"]
    assert report.output == report.output_before
    assert "no nearer with others: all stay" in report.title
    assert report.sites[0].error is None
    assert report.sites[0].errors.keys() == {"tiles:8"}
    assert sla_compile.gates(model)["blocks.0.attention.sla"].model_config == before


def test_attentions_of_one_module_get_one_order() -> None:
    model = nn.Sequential(TwoAttentions())
    report = sla_compile.choose_orders(model, batches(), orders=TRIED, config=SETTINGS)
    sums = {order: sum(site.errors[order] ** 2 for site in report.sites) for order in TRIED}
    assert len(report.sites) == 2
    best = min(sums, key=sums.__getitem__)
    assert set(orders(model)) == {best if report.output < report.output_before else "raster"}


class WithText(Attention):
    """To all tokens, and then to the first 160 of them alone, which are no grid."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + super().forward(x)
        q, k, v = self.heads(x[:, :160])
        return F.pad(self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)), (0, 0, 0, 352))


def test_an_attention_that_can_have_no_order_counts_with_that_of_the_model() -> None:
    """Else an order that only one of two attentions has would be summed over one."""
    model = nn.Sequential(WithText())
    report = sla_compile.choose_orders(model, batches(), orders=TRIED, config=SETTINGS)
    video, text = report.sites
    assert set(video.errors) == set(TRIED)
    assert set(text.errors) == {"raster"}
    assert len({*orders(model)}) == 1
    for tiles, best in ((0.31, "raster"), (0.29, "tiles:8")):
        found = {"sla": Errors({"raster": [0.3], "tiles:8": [tiles]}, 1.0), "sla_1": Errors({"raster": [0.4]}, 1.0)}
        assert best_orders(found) == best_orders(found, "head") == {"": best}


def test_nothing_changes_without_a_grid() -> None:
    model = looking(1, 0)
    with refused(
        "blocks.0.attention.sla", "of 2 attention(s) none can have another order", "give one by grid=(T, H, W)"
    ):
        sla_compile.choose_orders(model, batches(), config={**SETTINGS, "grid": None})
    assert not sla_compile.gates(model)


def test_settings_are_as_they_were_after_a_failure() -> None:
    model, data = prepared(looking(1, 0), reorder="hilbert"), batches()
    with refused("blocks.0.attention.sla", "not finite"):
        sla_compile.choose_orders(model, [*data, (data[0][0] * math.nan,)], orders=TRIED)
    assert orders(model) == ["hilbert", "hilbert"]


def test_an_output_that_is_not_finite_is_refused() -> None:
    class Overflowing(Model):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * math.inf

    model = Overflowing(1)
    with refused("Overflowing: its output is not finite on the first batches"):
        sla_compile.choose_orders(model, batches(), orders=TRIED, config=SETTINGS)
    assert not sla_compile.gates(model)


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (0, "SomeBlocks: no attention with a gate was reached"),
        (1, "blocks.1.attention.sla: its attention is not reached"),
    ],
)
def test_a_first_batch_that_does_not_reach_all_is_refused(blocks: int, message: str) -> None:
    """Prepared with it the model would lose gates."""
    model = sla_compile.prepare(SomeBlocks(2), batches()[0], config={**SETTINGS, "reorder": "hilbert"})
    with refused(message):
        sla_compile.choose_orders(model, [(batches()[0][0], blocks), batches()[0]], orders=TRIED)
    assert orders(model) == ["hilbert", "hilbert"]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"orders": "tiles"}, ("orders: got 'tiles'", "a sequence")),
        ({"orders": ()}, ("orders: got ()", "at least one")),
        ({"orders": ["tiles:0"]}, ("reorder", "'tiles:0'", "tiles:N")),
        ({"max_batches": 0}, ("max_batches: got 0", "at least 1")),
        ({"by": "layer"}, ("by: got 'layer'", "'site', 'head'")),
        ({"orders": ["raster,tiles"]}, ("orders: got 'raster,tiles'", "for all heads")),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], parts: tuple[str, ...]) -> None:
    model = looking(1)
    with refused(*parts):
        sla_compile.choose_orders(model, batches(), config=SETTINGS, **arguments)
    assert not sla_compile.gates(model)
