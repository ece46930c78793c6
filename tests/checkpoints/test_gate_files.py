"""save and load: round trips, what a file holds, and every refusal, with nothing half-loaded."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import sla_compile.checkpoints.gate_files as checkpoint
from sla_compile.checkpoints.gate_files import load, save
from sla_compile.config import SITE_FIELDS, SLAConfig
from sla_compile.gate import Gate, gates, model_config
from sla_compile.gate_attachment import attach_gate
from sla_compile.gate_settings import GateSpec

HEADS, HEAD_DIM = 2, 16
CONFIG = SLAConfig(
    linear="marginal", topk=0.25, min_tokens=0, inner="eager", overrides={"blocks.1.*": {"gate": "per_head"}}
)
IN_FILE = dataclasses.replace(CONFIG, inner=SLAConfig().inner)
"""The same without what configures a compiler."""
PATHS = ["blocks.0.attn.sla", "blocks.1.attn.sla"]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(HEADS * HEAD_DIM, 3 * HEADS * HEAD_DIM)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, HEAD_DIM)).permute(2, 0, 3, 1, 4)
        out: torch.Tensor = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return out


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.attn(x)
        return out


class Model(nn.Module):
    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def prepared(config: SLAConfig = CONFIG, blocks: int = 2, fill: bool = True) -> Model:
    """A model with gates, filled with values that only these gates have."""
    model = Model(blocks)
    for index, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        path = f"blocks.{index}.attn"
        spec = GateSpec(
            heads=HEADS,
            head_dim=HEAD_DIM,
            config=config.for_site(path),
            model_config=config,
            path=f"{path}.sla",
        )
        attach_gate(block.attn, spec, device=torch.device("cpu"), dtype=torch.float32)
    generator = torch.Generator().manual_seed(7)
    for gate in gates(model).values() if fill else ():
        for parameter in gate.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def same_file(a: Path, b: Path) -> bool:
    with safe_open(a, framework="pt") as one, safe_open(b, framework="pt") as two:
        return one.metadata() == two.metadata() and same(load_file(a), load_file(b))


def gate_values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {f"{path}.{n}": p.detach().clone() for path, g in gates(model).items() for n, p in g.named_parameters()}


def refused(*parts: str) -> Any:
    return pytest.raises(ValueError, match="(?s)" + ".*".join(re.escape(part) for part in parts))


def rewrite(
    path: Path, *, drop: tuple[str, ...] = (), add: dict[str, torch.Tensor] | None = None, **changes: Any
) -> None:
    """Write the gate file again with other metadata or tensors."""
    with safe_open(path, framework="pt") as opened:
        metadata = {**opened.metadata(), **changes}
    tensors = {k: v for k, v in load_file(path).items() if k not in drop} | (add or {})
    save_file(tensors, path, {k: v for k, v in metadata.items() if v is not None})


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "gates.safetensors"
    save(prepared(), path)
    return path


def test_file_holds_gates_config_and_sites(saved: Path) -> None:
    model = prepared()
    assert same(load_file(saved), gate_values(model))
    assert sorted(load_file(saved)) == [f"{path}.{part}" for path in PATHS for part in ("bias", "weight")]
    with safe_open(saved, framework="pt") as opened:
        metadata = opened.metadata()
    assert {k: metadata[k] for k in ("format", "version")} == {"format": "sla_compile", "version": "1"}
    assert SLAConfig.from_json(metadata["config"]) == IN_FILE
    assert not {"inner", "inductor"} & json.loads(metadata["config"]).keys()
    sites = json.loads(metadata["sites"])
    assert [(s["path"], s["heads"], s["head_dim"]) for s in sites] == [(path, HEADS, HEAD_DIM) for path in PATHS]
    assert [s["config"]["gate"] for s in sites] == ["shared", "per_head"]
    assert all(set(s["config"]) == set(SITE_FIELDS) for s in sites)


def test_fresh_model_gains_the_gates(saved: Path) -> None:
    model = Model()
    dense = state(model)
    assert load(model, saved) is model
    assert same(gate_values(model), gate_values(prepared()))
    assert model_config(model) == IN_FILE
    for path, gate in gates(model).items():
        assert isinstance(gate, Gate)
        assert gate.config == IN_FILE.for_site(path.removesuffix(".sla"))
        assert all(p.requires_grad and p.is_leaf and not p.is_inference() for p in gate.parameters())
    assert same({k: v for k, v in state(model).items() if ".sla." not in k}, dense)
    save(model, saved.with_name("again"))
    assert same_file(saved.with_name("again"), saved)


def test_prepared_model_is_filled_in_place(saved: Path) -> None:
    model = prepared(fill=False)
    before = {path: (gate, gate.weight, gate.weight.data_ptr()) for path, gate in gates(model).items()}
    load(model, saved)
    assert same(gate_values(model), gate_values(prepared()))
    for path, gate in gates(model).items():
        assert before[path] == (gate, gate.weight, gate.weight.data_ptr())


@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "prepared"])
def test_random_state_and_requires_grad_stay(saved: Path, fresh: bool) -> None:
    model = Model() if fresh else prepared(fill=False)
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 2 == 0)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    before = torch.get_rng_state()
    with torch.inference_mode():
        load(model, saved)
    assert torch.equal(torch.get_rng_state(), before)
    assert {name: p.requires_grad for name, p in model.named_parameters() if name in flags} == flags
    assert not any(p.is_inference() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_gates_take_the_owners_dtype(saved: Path, dtype: torch.dtype) -> None:
    model = load(Model().to(dtype), saved)
    assert {p.dtype for p in model.parameters()} == {dtype}
    expected = gate_values(prepared())
    assert same(gate_values(model), {k: v.to(dtype) for k, v in expected.items()})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_every_gate_dtype_is_stored_as_it_is(tmp_path: Path, dtype: torch.dtype) -> None:
    model = prepared().to(dtype)
    save(model, tmp_path / "gates")
    assert same(load_file(tmp_path / "gates"), gate_values(model))


def test_owner_without_parameters_takes_those_around_it(tmp_path: Path) -> None:
    class Core(nn.Module):
        """Scaled dot product attention as a module of its own."""

    def build() -> Any:
        block = Block()
        block.core, block.counts = Core(), nn.Embedding(2, 2, dtype=torch.float64)
        return nn.ModuleDict({"head": nn.Linear(2, 2), "block": block.to(torch.bfloat16)})

    source = build()
    spec = GateSpec(heads=3, head_dim=8, config=SLAConfig(), path="block.core.sla_1", ordinal=1)
    attach_gate(source["block"].core, spec, device=torch.device("cpu"), dtype=torch.float32)
    save(source, tmp_path / "gates")
    model: Any = load(build(), tmp_path / "gates")
    assert list(gates(model)) == ["block.core.sla_1"]
    assert model["block"].core.sla_1.shift.dtype == torch.bfloat16


def test_module_without_any_parameter_takes_the_files_dtype(tmp_path: Path) -> None:
    source = nn.Identity()
    spec = GateSpec(heads=3, head_dim=8, config=SLAConfig(), path="sla")
    attach_gate(source, spec, device=torch.device("cpu"), dtype=torch.float64)
    save(source, tmp_path / "gates")
    model = load(nn.Identity(), tmp_path / "gates")
    assert {k: v.dtype for k, v in gate_values(model).items()} == {"sla.shift": torch.float64}


def test_compiled_models_share_the_paths(saved: Path) -> None:
    def wrap(model: Any, regional: bool) -> Any:
        if not regional:
            return torch.compile(model, backend="eager")
        for index, block in enumerate(model.blocks):
            model.blocks[index] = torch.compile(block, backend="eager")
        return model

    for regional in (True, False):
        other = saved.with_name("compiled")
        save(wrap(prepared(), regional), other)
        assert same_file(other, saved)
        inner = Model()
        fresh = wrap(inner, regional)
        assert load(fresh, saved) is fresh
        assert same(gate_values(inner), gate_values(prepared()))
        assert sorted(gates(fresh)) == PATHS
        assert model_config(fresh) == IN_FILE
        load(wrap(prepared(fill=False), regional), saved)


def test_plain_state_dict_round_trip() -> None:
    source, target = prepared(), prepared(fill=False)
    target.load_state_dict(copy.deepcopy(source.state_dict()))
    assert same(state(target), state(source))
    with pytest.raises(RuntimeError, match=r"blocks\.0\.attn\.sla\.weight"):
        Model().load_state_dict(source.state_dict())


def test_nothing_is_shared_with_the_file(saved: Path) -> None:
    model = load(Model(), saved)
    content = saved.read_bytes()
    with torch.no_grad():
        gates(model)[PATHS[0]].weight.fill_(3)
    assert saved.read_bytes() == content
    expected = gate_values(model)
    save(model, saved)  # over the file it was loaded from
    assert same(gate_values(model), expected)
    assert same(load_file(saved), expected)


def test_failing_write_leaves_the_old_file_alone(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    content = saved.read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        save(prepared(SLAConfig()), saved)
    assert saved.read_bytes() == content
    assert list(saved.parent.iterdir()) == [saved]


def test_save_writes_beside_the_target_then_replaces_it(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moves: list[tuple[Path, Path]] = []
    synced: list[int] = []
    real_replace, real_fsync = os.replace, os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(len(moves))
        real_fsync(descriptor)

    def replace(source: str, target: str) -> None:
        moves.append((Path(source), Path(target)))
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    link = saved.with_name("link")
    link.symlink_to(saved)
    save(prepared(), link)
    ((source, target),) = moves
    assert synced == [0], "flushed to disk once, before the replacement"
    assert (target, source.parent) == (saved, saved.parent)
    assert link.is_symlink()
    assert sorted(p.name for p in saved.parent.iterdir()) == ["gates.safetensors", "link"]


def test_new_file_has_ordinary_permissions(saved: Path) -> None:
    plain = saved.with_name("plain")
    plain.touch()
    assert saved.stat().st_mode == plain.stat().st_mode


def test_save_needs_gates(tmp_path: Path) -> None:
    with refused("save: Model has no SLA gates; accepted: a model after sla_compile.prepare, or after"):
        save(Model(), tmp_path / "gates")
    assert list(tmp_path.iterdir()) == []


class Sharded(nn.Parameter):
    """A parameter whose values may be elsewhere."""


def test_parameters_that_are_not_plain_are_listed(saved: Path) -> None:
    content = saved.read_bytes()
    model = prepared(fill=False)
    gates(model)[PATHS[0]].weight = Sharded(torch.zeros(HEAD_DIM, HEAD_DIM))
    gates(model)[PATHS[1]].to("meta")
    before = state(model)
    lines = (
        "3 problem(s), nothing was changed:",
        "blocks.0.attn.sla.weight: a Sharded; accepted: a plain tensor or a DTensor",
        "blocks.1.attn.sla.weight: on the meta device; accepted: a tensor with values",
        "blocks.1.attn.sla.bias: on the meta device",
    )
    with refused(f"save to {str(saved)!r}: ", *lines):
        save(model, saved)
    assert saved.read_bytes() == content
    with refused(f"load of {str(saved)!r} into Model: ", *lines):
        load(model, saved)
    assert torch.equal(before["blocks.0.attn.sla.bias"], gates(model)[PATHS[0]].bias)


def test_missing_extra_and_wrongly_shaped_gates_are_listed_together(saved: Path) -> None:
    model = prepared(blocks=3, fill=False)
    gate = gates(model)[PATHS[0]]
    gate.weight = nn.Parameter(torch.zeros(HEAD_DIM, 2 * HEAD_DIM))
    del model.get_submodule("blocks.1.attn").sla
    before = state(model)
    with refused(
        f"load of {str(saved)!r} into Model: 3 problem(s), nothing was changed:",
        "blocks.2.attn.sla: missing in the file",
        "blocks.0.attn.sla.weight: shape (16, 16) in the file, (16, 32) in the model",
        "blocks.1.attn.sla: extra in the file, no such gate in the model",
    ):
        load(model, saved)
    assert same(state(model), before)


def test_owners_that_do_not_fit_are_listed_together(tmp_path: Path) -> None:
    path = tmp_path / "gates"
    save(prepared(blocks=5), path)
    model = Model(4)
    model.blocks[1].attn = nn.Identity()
    model.blocks[1].attn.sla = nn.Identity()
    del model.blocks[2].attn
    model.blocks[3].to("meta")
    names = [name for name, _ in model.named_modules()]
    with refused(
        f"load of {str(path)!r} into Model: 4 problem(s), nothing was changed:",
        "blocks.1.attn.sla: the module has another attribute 'sla' already",
        "blocks.2.attn.sla: no module 'blocks.2.attn' in the model",
        "blocks.3.attn.sla: its owner is on the meta device; accepted: an owner with values",
        "blocks.4.attn.sla: no module 'blocks.4.attn' in the model",
    ):
        load(model, path)
    assert [name for name, _ in model.named_modules()] == names
    assert model_config(model) is None


def test_one_module_under_two_names_takes_one_gate(saved: Path) -> None:
    model = Model()
    model.blocks[1] = model.blocks[0]
    with refused("1 problem(s), nothing was changed:", "blocks.1.attn.sla: no module 'blocks.1.attn' in the model"):
        load(model, saved)
    assert not gates(model)
    tied = prepared()
    tied.blocks[1] = tied.blocks[0]
    save(tied, saved)
    assert list(gates(load(model, saved))) == PATHS[:1]


def test_other_settings_are_listed_in_one_error(saved: Path) -> None:
    other = dataclasses.replace(CONFIG, topk=0.5, linear="all", exclude=("mid",), inner="aot_eager")
    model = prepared(other, fill=False)
    before = state(model)
    with refused(
        f"load of {str(saved)!r}: its gates were trained for other settings than the model was ",
        "prepared with: ",
        "topk is 0.25 in the file, 0.5 in the model; ",
        "linear is 'marginal' in the file, 'all' in the model; ",
        "exclude is () in the file, ('mid',) in the model; ",
        "accepted: a model prepared with the file's settings, or not prepared",
    ) as caught:
        load(model, saved)
    assert "inner" not in str(caught.value)
    assert same(state(model), before)


def test_settings_that_say_no_linear_are_those_of_before_there_was_another_default(saved: Path) -> None:
    rewrite(saved, config=json.dumps({k: v for k, v in CONFIG.to_dict().items() if k != "linear"}))
    model = load(Model(), saved)
    assert model_config(model) == IN_FILE
    assert {gate.config.linear for gate in gates(model).values()} == {"marginal"}


def test_a_model_prepared_for_another_form_is_refused(saved: Path) -> None:
    model = prepared(SLAConfig(topk=0.25, min_tokens=0), fill=False)
    with refused("linear is 'marginal' in the file, 'taylor' in the model", "or not prepared"):
        load(model, saved)


def test_settings_of_one_site_are_compared(saved: Path) -> None:
    model = prepared(fill=False)
    gate = gates(model)[PATHS[1]]
    gate.config = dataclasses.replace(gate.config, block_q=128)
    with refused("blocks.1.attn.sla: block_q is 64 in the file, 128 in the model; accepted"):
        load(model, saved)


def test_gate_that_cannot_be_made_takes_the_others_along(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory_at_the_second(owner: nn.Module, *args: Any, **kwargs: Any) -> Gate:
        if args[0].path == PATHS[1]:
            raise torch.OutOfMemoryError("out of memory")
        return attach_gate(owner, *args, **kwargs)

    model = Model()
    monkeypatch.setattr(checkpoint, "attach_gate", out_of_memory_at_the_second)
    with pytest.raises(torch.OutOfMemoryError):
        load(model, saved)
    assert not gates(model)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    "changes",
    [{"inner": "aot_eager"}, {"inner": "inductor", "inductor": {"max_autotune": True}}, {"min_tokens": None}],
)
def test_the_way_of_compiling_and_when_to_be_sparse_may_differ(saved: Path, changes: dict[str, Any]) -> None:
    config = dataclasses.replace(CONFIG, **changes)
    model = load(prepared(config, fill=False), saved)
    assert same(gate_values(model), gate_values(prepared()))
    assert model_config(model) == config


@pytest.mark.parametrize(
    "options", [{"option_of_the_future": True}, {"cpp.cxx": ["/tmp/evil"]}], ids=["unknown", "a compiler"]
)
def test_inductor_options_in_a_file_are_left_out_with_a_warning(saved: Path, options: dict[str, Any]) -> None:
    data = {**CONFIG.to_dict(), "inner": "inductor", "inductor": options}
    rewrite(saved, config=json.dumps(data))
    model = Model()
    with pytest.warns(UserWarning, match=re.escape(f"Inductor options are left out: {next(iter(options))!r}")) as w:
        load(model, saved)
    assert w[0].filename == __file__
    assert model_config(model) == IN_FILE
    assert not any(gate.config.inductor for gate in gates(model).values())


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape(f"there is no folder {str(tmp_path / 'none')!r}")):
        save(prepared(), tmp_path / "none" / "gates.safetensors")
    with pytest.raises(FileNotFoundError, match=re.escape(f"load: no file {str(tmp_path / 'none')!r}")):
        load(Model(), tmp_path / "none")


def test_a_state_dict_is_no_file_of_gates(tmp_path: Path) -> None:
    advice = r"sla_compile\.prepare\(model, \.\.\.\) as that model was, then model\.load_state_dict"
    with pytest.raises(TypeError, match=rf"load: got a OrderedDict with 8 entries; .*{advice}"):
        load(Model(), prepared().state_dict())  # type: ignore[arg-type]
    save_file(prepared().state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"the state dict of a model, with gates \(first: blocks\..*{advice}"):
        load(Model(), tmp_path / "model.safetensors")
    with pytest.raises(FileNotFoundError, match=r"no 'sla_gates.safetensors' in .*then load_state_dict"):
        load(Model(), tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 100, -1], ids=["empty", "in the size", "in the header", "last byte gone"])
def test_truncated_file(saved: Path, keep: int) -> None:
    content = saved.read_bytes()[:keep]
    saved.write_bytes(content)
    model = Model()
    with refused(
        f"load: {str(saved)!r} ({len(content)} bytes) is truncated or no safetensors file: ",
        "; accepted: a file that sla_compile.save wrote",
    ):
        load(model, saved)
    assert not gates(model)


def test_pickle_is_refused(tmp_path: Path) -> None:
    torch.save(prepared().state_dict(), tmp_path / "model.pt")
    with refused("bytes) is truncated or no safetensors file: "):
        load(Model(), tmp_path / "model.pt")


def test_safetensors_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(Model().state_dict(), path)
    with refused(
        f"load: {str(path)!r} is a safetensors file of something else: metadata {{}}, ",
        "tensors blocks.0.attn.qkv.bias, ",
        "accepted: metadata with format 'sla_compile', as sla_compile.save writes",
    ):
        load(Model(), path)
    save_file({}, path, {"format": "pt"})
    with refused("is a safetensors file of something else: metadata {'format': 'pt'}, tensors none, ...;"):
        load(Model(), path)


@pytest.mark.parametrize("version", ["2", None])
def test_other_version(saved: Path, version: str | None) -> None:
    rewrite(saved, version=version)
    with refused(f"load: {str(saved)!r} has version {version!r}; accepted: version '1'"):
        load(Model(), saved)


SITE = {
    "path": PATHS[0],
    "heads": HEADS,
    "head_dim": HEAD_DIM,
    "config": {n: getattr(CONFIG, n) for n in SITE_FIELDS},
}


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"config": None}, ("no entry 'config'",)),
        ({"sites": None}, ("no entry 'sites'",)),
        ({"config": "{"}, ("Expecting property name",)),
        ({"config": "[]"}, ("SLAConfig: got [] (list); accepted: a mapping of fields",)),
        (
            {"config": '{"version": 1, "topk": 2}'},
            ("SLAConfig.topk: got 2 (int); accepted: a number above 0",),
        ),
        ({"sites": "3"}, ("sites: got 3 (int); accepted: a list of at least one site",)),
        ({"sites": "[]"}, ("sites: got [] (list); accepted: a list of at least one site",)),
        ({"sites": json.dumps([{"path": "a"}])}, ("no entry 'heads'",)),
        (
            {"sites": json.dumps([{**SITE, "heads": 2.0}])},
            (f"sites[0], {PATHS[0]!r}: heads: got 2.0 (float); accepted: an integer from 1 to 65536",),
        ),
        ({"sites": json.dumps([{**SITE, "config": {}}])}, ("no entry 'topk'",)),
    ],
)
def test_unreadable_metadata(saved: Path, changes: dict[str, Any], parts: tuple[str, ...]) -> None:
    rewrite(saved, **changes)
    fresh, ready = Model(), prepared(fill=False)
    for model in (fresh, ready):
        before = state(model)
        with refused(f"load: {str(saved)!r} has metadata that cannot be read: ", *parts):
            load(model, saved)
        assert same(state(model), before)


def test_tensors_that_do_not_fit_the_files_own_sites_are_listed_together(saved: Path) -> None:
    added = {
        "blocks.0.attn.sla.weight": torch.zeros(16, 8),
        "blocks.1.attn.sla.weight": torch.zeros(2, 16, 16, dtype=torch.int64),
        "blocks.7.attn.sla.weight": torch.zeros(1),
    }
    rewrite(saved, drop=("blocks.1.attn.sla.bias",), add=added)
    for model, extra in ((Model(1), 1), (prepared(blocks=1, fill=False), 1), (Model(), 0)):
        before = state(model)
        with refused(
            f"load of {str(saved)!r} into Model: {4 + extra} problem(s), nothing was changed:",
            "blocks.0.attn.sla.weight: shape (16, 8) in the file, its site needs (16, 16)",
            "blocks.1.attn.sla.weight: torch.int64 in the file; accepted: a floating dtype",
            "blocks.1.attn.sla.bias: missing in the file",
            "blocks.7.attn.sla.weight: extra in the file, of no site in its list",
            "blocks.1.attn.sla: " if extra else "",
        ):
            load(model, saved)
        assert same(state(model), before)


def test_strange_gate_path(saved: Path) -> None:
    renamed = {"blocks.0.attn.slab.weight": torch.zeros(16, 16), "blocks.0.attn.slab.bias": torch.zeros(16)}
    drop = tuple(f"{path}.{part}" for path in PATHS for part in ("weight", "bias"))
    rewrite(saved, sites=json.dumps([{**SITE, "path": "blocks.0.attn.slab"}]), add=renamed, drop=drop)
    with refused("blocks.0.attn.slab: no gate path; accepted: its owner's path, then sla, sla_1, ..."):
        load(Model(), saved)
