"""``atlas``: its numbers against full attention maps of the definition, and that nothing in the model changes."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sla_compile
from sla_compile.__main__ import main
from sla_compile.fitting.observer import GatedCall
from sla_compile.inspection import attention_map
from sla_compile.inspection.attention_map import _Sketch
from sla_compile.kernels import reference
from tests.support import allocation as uneven_model
from tests.support.calibration import assert_same_state, batches, made, recorded, state
from tests.support.closeness import relative_error
from tests.support.models import OPTIONS, Attention, Model, random_input, randomize_gates
from tests.support.reports import assert_fits


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    torch.compiler.reset()
    monkeypatch.setitem(attention_map._ELEMENTS, "cpu", 100 * 16 * 2)  # several chunks, also of a hundred tokens


def map_of(call: GatedCall) -> tuple[Tensor, Tensor, Tensor]:
    """Weights (B, H, N, L), which pairs attend, and M repeated to tokens, by the definition."""
    options = call.options()
    causal, bias = options.get("causal", False), reference.key_bias(call.key_mask, call.key)
    logits = call.query @ call.key.mT * call.scale + bias[:, None, None]
    allowed = logits > -math.inf
    if causal:
        allowed = allowed.tril()
    weights = logits.masked_fill(~allowed, -math.inf).softmax(-1)
    names = ("scale", "topk", "bottomk", "block_q", "block_k")
    block_map = reference.classify(
        call.query, call.key, key_mask=call.key_mask, causal=causal, **{name: options[name] for name in names}
    )
    tokens = block_map.repeat_interleave(options["block_q"], 2).repeat_interleave(options["block_k"], 3)
    return weights, allowed, tokens[:, :, : weights.shape[2], : weights.shape[3]]


def check_head(head: Any, number: int, call: GatedCall) -> None:
    weights, allowed, classes = (x[:, number] for x in map_of(call))
    rows = weights.shape[0] * weights.shape[1]
    for name, value in {"critical": 1, "marginal": 0, "negligible": -1}.items():
        assert head.mass[name] == pytest.approx(weights[classes == value].sum().item() / rows, abs=1e-6)
    share = 1 / allowed.sum(-1, keepdim=True).double()
    assert head.above_mean == pytest.approx((weights > share).sum().item() / allowed.sum().item(), abs=1e-9)
    assert head.tiny == pytest.approx(((weights < share / 100) & allowed).sum().item() / allowed.sum().item(), abs=1e-9)
    assert head.mass["critical"] - 1e-9 <= head.best_mass
    assert 0 <= head.recall <= 1
    sparse, linear = call.branches()
    assert linear is not None
    dense = call.dense[:, number]
    assert head.errors.sparse == pytest.approx(relative_error(sparse[:, number], dense), rel=1e-6)
    assert head.errors.linear == pytest.approx(relative_error(linear[:, number], dense), rel=1e-6)
    out = call.output_with_gate(*call.gate.parameters())[:, number]
    assert head.errors.sum == pytest.approx(relative_error(out, dense), rel=1e-6)


class Masked(nn.Module):
    """Attention with this mask over keys."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.attention = Attention(attn_mask=mask)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x)


@pytest.mark.parametrize("kind", ["plain", "causal", "bool mask", "additive mask"])
def test_shares_and_errors_are_those_of_the_whole_map(kind: str) -> None:
    keep = torch.arange(100) < 83
    models: dict[str, Callable[[], nn.Module]] = {
        "plain": Model,
        "causal": lambda: Attention(is_causal=True),
        "bool mask": lambda: Masked(keep[None, None, None]),
        "additive mask": lambda: Masked(torch.where(keep, torch.linspace(0, -3, 100), -1e4).double()[None, None, None]),
    }
    model = made(models[kind]())
    randomize_gates(model)
    data = batches(1)
    calls = recorded(model, data)
    found = sla_compile.atlas(model, data, allocation=False)
    assert [site.path for site in found.sites] == list(calls)
    for site in found.sites:
        (call,) = calls[site.path]
        for number, head in enumerate(site.heads):
            check_head(head, number, call)


def test_recall_and_the_best_choice() -> None:
    model = made(nn.Sequential(Attention()), block_q=32)
    call = recorded(model, batches(1))["0.sla"][0]
    weights, _, classes = map_of(call)
    sums, _ = attention_map.measure_call(call, with_maps=False)
    for head, total in enumerate(sums):
        best = recalled = 0.0
        for item, start in itertools.product(range(2), range(0, 100, 32)):
            rows = weights[item, head, start : start + 32]
            mass = torch.stack([part.sum() for part in rows.split(16, 1)])
            chosen = torch.stack([part[0, 0] == 1 for part in classes[item, head, start : start + 32].split(16, 1)])
            top = mass.topk(int(chosen.sum()))
            best += top.values.sum().item()
            recalled += chosen[top.indices].double().mean().item()
        assert total.best == pytest.approx(best, rel=1e-6)
        assert total.recalled == pytest.approx(recalled, rel=1e-6)


def test_the_stable_rank_of_a_known_matrix() -> None:
    left, right = (torch.linalg.qr(torch.randn(n, 40).double()).Q for n in (300, 200))
    values = 0.8 ** torch.arange(40).double()
    matrix = (left * values) @ right.mT
    sketch = _Sketch(200, matrix.device)
    for rows in matrix.split(70):
        sketch.add(rows)
    assert sketch.stable_rank() == pytest.approx(float(values.square().sum()), rel=0.05)


def test_the_allocation_is_that_of_allocate_and_the_model_stays() -> None:
    model, data = uneven_model.prepared(uneven_model.uneven()), uneven_model.batches()
    before, random_state = state(model), torch.get_rng_state()
    found = sla_compile.atlas(model, data)
    assert_same_state(state(model), before)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert found.budget == uneven_model.BUDGET
    report = sla_compile.allocate(model, data, budget=uneven_model.BUDGET)
    assert found.allocation is not None
    assert found.allocation.to_dict() == report.to_dict()
    assert [site.suggested for site in found.sites] == [site.topk for site in report.sites]
    for site, allocated in zip(found.sites, report.sites, strict=True):
        assert dict(site.curve)[uneven_model.BUDGET] == pytest.approx(allocated.uniform)
        assert site.fitted < site.errors.sum
    easy, hard = found.sites[:2]
    assert easy.mean("mass", "critical") > 0.9 > 0.5 > hard.mean("mass", "critical")


class Timed(Model):
    def forward(self, x: Tensor, timestep: Tensor | None = None) -> Tensor:
        return super().forward(x)


def test_over_denoising_times() -> None:
    data: list[Any] = [(random_input(), torch.tensor([900, 700])), {"x": random_input(), "timestep": 20.0}]
    data.append((random_input(),))
    found = sla_compile.atlas(Timed().double(), data, OPTIONS, allocation=False)
    assert [batch.time for batch in found.sites[0].batches] == [800.0, 20.0, None]
    site = found.sites[0]
    dense = [batch.critical_mass for batch in site.batches]
    assert sum(dense) / 3 == pytest.approx(site.mean("mass", "critical"))
    assert "over denoising times" in str(site)


class Page(HTMLParser):
    """Collects tags; fails on what would be loaded from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            assert name not in ("src", "href") or (value or "").startswith("data:"), (name, value)


def test_everything_it_is_drawn_as(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = sla_compile.atlas(Model(), [(torch.randn(1, 600, 32),)], {**OPTIONS, "topk": 0.1})
    assert len(found.sites[0].heads[0].map.mass) == attention_map.CELLS < 600 / 16
    assert_fits(found)
    assert_fits(found.site("blocks.0.attention"))
    for name in ("atlas.png", "atlas.svg", "atlas.html", "atlas.json"):
        found.save(tmp_path / name)
    found.save(tmp_path / "site.png", "blocks.1.attention")
    assert (tmp_path / "site.png").read_bytes().startswith(b"\x89PNG")
    page = Page()
    page.feed((tmp_path / "atlas.html").read_text())
    assert page.tags.count("img") == 3
    assert page.tags.count("details") == 2
    assert "script" not in page.tags
    assert json.loads((tmp_path / "atlas.json").read_text()) == json.loads(json.dumps(found.to_dict()))
    assert "map" not in found.to_dict(maps=False)["sites"][0]["heads"][0]
    with pytest.raises(ValueError, match=r"path: got 'x'; accepted: one of blocks\.0\.attention\.sla, "):
        found.site("x")
    with pytest.raises(ValueError, match=r"ends in one of \.png, \.svg, \.pdf, \.html, \.json"):
        found.save(tmp_path / "atlas.doc")


def test_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "factory_of_atlas.py").write_text(
        "import torch\nfrom tests.support.models import Model, WIDTH\n"
        "def make(tokens=100):\n    return Model(1), (torch.randn(1, tokens, WIDTH),)\n"
        "def keywords():\n    return Model(1), (), {'x': torch.randn(1, 100, WIDTH)}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    small = [word for name in ("min_tokens=0", "block_q=16", "block_k=16") for word in ("--config", name)]
    command = ["atlas", "factory_of_atlas:make", *small]
    assert main([*command, "--width", "100", "--out", str(tmp_path / "a.json")]) == 0
    assert "critical mass" in capsys.readouterr().out
    assert (tmp_path / "a.json").exists()
    assert main([*command, "--site", "blocks.0.attention", "--width", "60"]) == 0
    assert "error against topk" in capsys.readouterr().out
    assert main(["atlas", "factory_of_atlas:keywords", *small, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sites"][0]["path"] == "blocks.0.attention.sla"
    assert main([*command, "--out", str(tmp_path / "a.doc")]) == 2
    assert "accepted: a name that ends in one of" in capsys.readouterr().err


@pytest.mark.parametrize("linear", ["none", "all", "taylor"])
def test_every_form_of_the_rest(linear: str) -> None:
    model, data = made(Model(1), linear=linear, bottomk=0.0, topk_by="head", max_topk=0.6), batches(1)
    (site,) = sla_compile.atlas(model, data).sites
    (call,) = recorded(model, data)[site.path]
    out = call.output_with_gate(*call.gate.parameters())
    assert site.errors.sum == pytest.approx(relative_error(out, call.dense), rel=1e-6)
    assert site.fitted <= site.errors.sum * (1 + 1e-9)
    assert (site.errors.sparse is None, site.errors.linear is None) == (linear == "taylor", linear != "all")
    assert_fits(site)
    compared = sla_compile.compare(model, data, inner=None).sites[0].errors
    assert compared.now == pytest.approx(site.errors.sum)
    assert compared.fitted == pytest.approx(site.fitted)
