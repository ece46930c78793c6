"""load_projections: the authors' ``proj_l`` weights, by the names that their checkpoints have, become gates."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import sla_compile
from sla_compile.kernels import reference
from tests.support.closeness import assert_close
from tests.support.models import HEADS, OPTIONS, WIDTH, Attention, Model, TwoAttentions, prepared_model, random_input

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "float64")

ALL = {**OPTIONS, "linear": "all"}
DIM = WIDTH // HEADS


class AuthorsModule(nn.Module):
    """What their module computes: sparse attention plus ``proj_l`` of linear attention over all keys."""

    def __init__(self) -> None:
        super().__init__()
        self.proj_l = nn.Linear(DIM, DIM)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        sparse = reference.sparse_linear_attention(
            q, k, v, topk=OPTIONS["topk"], bottomk=OPTIONS["bottomk"], block_q=16, block_k=16, linear="none"
        )
        q, k = q.softmax(-1), k.softmax(-1)
        linear = q @ (k.mT @ v) / (q * k.sum(-2, keepdim=True)).sum(-1, keepdim=True)
        result: Tensor = sparse + self.proj_l(linear)
        return result


class AuthorsAttention(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.local_attn = AuthorsModule()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.local_attn(*self.heads(x)).transpose(1, 2).flatten(2))
        return out


def authors_model(blocks: int = 2) -> nn.Module:
    model = Model(blocks)
    for block in model.blocks:
        block.attention = AuthorsAttention()
    return model


def prepared(model: nn.Module | None = None, **settings: Any) -> nn.Module:
    config = {**ALL, **settings}
    return prepared_model(**config) if model is None else sla_compile.prepare(model, (random_input(),), config=config)


def projections(pattern: str, blocks: int = 2) -> dict[str, Tensor]:
    """A checkpoint with other weights too; ``pattern`` is where block {} has its ``proj_l``."""
    state = {"patch_embedding.weight": torch.randn(3, 3), "blocks.0.ffn.0.bias": torch.randn(3)}
    for block in reversed(range(blocks)):  # a state dict has no order to rely on
        state[f"{pattern.format(block)}.proj_l.bias"] = torch.randn(DIM)
        state[f"{pattern.format(block)}.proj_l.weight"] = torch.randn(DIM, DIM)
    return state


def assert_filled(model: nn.Module, state: dict[str, Tensor], pattern: str) -> None:
    for block, gate in enumerate(sla_compile.gates(model).values()):
        assert torch.equal(gate.weight.detach(), state[f"{pattern.format(block)}.proj_l.weight"].to(gate.weight))
        assert torch.equal(gate.bias.detach(), state[f"{pattern.format(block)}.proj_l.bias"].to(gate.bias))


def refused(*parts: str) -> Any:
    return pytest.raises(ValueError, match="(?s)" + ".*".join(re.escape(part) for part in parts))


def gate_values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in sla_compile.gate_parameters(model)]


def test_computes_what_the_authors_module_computes() -> None:
    theirs, x = authors_model(), random_input()
    state = theirs.state_dict()
    model = Model()
    model.load_state_dict({name: value for name, value in state.items() if "proj_l" not in name})
    sla_compile.load_projections(prepared(model), state)
    run = torch.compile(model, backend="sla", options={"inner": "aot_eager"})
    assert_close("output", run(x), theirs(x), 1e-10)


@pytest.mark.parametrize(
    "pattern",
    [
        "blocks.{}.attention",
        "blocks.{}.attention.attn_impl",
        "blocks.{}.self_attn.attn_op.local_attn",
        "net.blocks.{}.self_attn.attn_op.local_attn",
        "model.diffusion_model.blocks.{}.attn1.local_attn",
    ],
    ids=["thu-ml/SLA", "FastVideo", "TurboDiffusion", "TurboDiffusion while training", "a wrapped model"],
)
def test_names_of_the_field(pattern: str) -> None:
    model, state = prepared(Model(blocks=12)), projections(pattern, blocks=12)
    assert sla_compile.load_projections(model, state) is model
    assert_filled(model, state, pattern)


def test_wan_of_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    torch.set_default_dtype(torch.float32)
    model = diffusers.WanTransformer3DModel(
        num_layers=3, num_attention_heads=2, attention_head_dim=DIM, ffn_dim=32, text_dim=16, freq_dim=16
    )
    inputs = torch.randn(1, 16, 2, 16, 16), torch.tensor([500]), torch.randn(1, 8, 16)
    sla_compile.prepare(model, inputs, config={"linear": "all", "min_tokens": 0})
    state = projections("blocks.{}.self_attn.attn_op.local_attn", blocks=3)
    sla_compile.load_projections(model, state)
    assert list(sla_compile.gates(model)) == [f"blocks.{i}.attn1.sla" for i in range(3)]
    assert_filled(model, state, "blocks.{}.self_attn.attn_op.local_attn")


def test_compiled_model_and_gates_of_another_dtype() -> None:
    model, state = prepared(Model().bfloat16()), projections("blocks.{}.attention")
    sla_compile.load_projections(torch.compile(model, backend="sla"), state)  # type: ignore[arg-type]
    assert {p.dtype for p in sla_compile.gate_parameters(model)} == {torch.bfloat16}
    assert_filled(model, state, "blocks.{}.attention")


def sharded(state: dict[str, Tensor], folder: Path) -> Path:
    (folder / "shards").mkdir()
    for number, (name, value) in enumerate(state.items()):
        save_file({name: value}, folder / "shards" / f"part-{number}.safetensors")
    return folder / "shards"


def whole(state: dict[str, Tensor], folder: Path) -> Path:
    save_file(state, folder / "dit.safetensors")
    return folder / "dit.safetensors"


def pickled(state: dict[str, Tensor], folder: Path) -> Path:
    torch.save(state, folder / "dit.pth")
    return folder / "dit.pth"


def nested(state: dict[str, Tensor], folder: Path) -> Path:
    torch.save({"state_dict": state, "step": 3}, folder / "dit.pt")
    return folder / "dit.pt"


@pytest.mark.parametrize("write", [whole, sharded, pickled, nested])
def test_files(write: Callable[[dict[str, Tensor], Path], Path], tmp_path: Path) -> None:
    model, state = prepared(), projections("blocks.{}.attention")
    sla_compile.load_projections(model, write(state, tmp_path))
    assert_filled(model, state, "blocks.{}.attention")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    model = prepared()
    with pytest.raises(FileNotFoundError, match="no file"):
        sla_compile.load_projections(model, tmp_path / "dit.pth")
    with refused("the folder", "has no .safetensors file"):
        sla_compile.load_projections(model, tmp_path)
    for name in ("dit.safetensors", "dit.pth"):
        (tmp_path / name).write_bytes(b"nothing of the kind")
        with refused("load_projections", name):
            sla_compile.load_projections(model, tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pth")
    with refused("holds a list"):
        sla_compile.load_projections(model, tmp_path / "list.pth")


def test_keys_and_gates_that_do_not_pair_up_are_listed() -> None:
    model = prepared(Model(blocks=3))
    state = projections("blocks.{}.attention", blocks=2) | {
        "blocks.7.attention.proj_l.weight": torch.randn(DIM, DIM),
        "blocks.7.attention.proj_l.bias": torch.randn(DIM),
    }
    before = gate_values(model)
    with refused(
        "2 problem(s), nothing was changed",
        "blocks.7.attention.proj_l.weight: fits no gate",
        "blocks.2.attention.sla: no projection fits it",
    ):
        sla_compile.load_projections(model, state)
    assert all(torch.equal(a, b) for a, b in zip(before, gate_values(model), strict=True))


def test_two_projections_in_one_block_are_not_guessed() -> None:
    state = projections("blocks.{}.self_attn") | projections("blocks.{}.audio_attn")
    with refused("blocks.0.audio_attn.proj_l.weight: fits no gate of the model, or several"):
        sla_compile.load_projections(prepared(), state)


def test_two_gates_of_one_owner_are_not_guessed() -> None:
    model = sla_compile.prepare(TwoAttentions(), (random_input(),), config=ALL)
    with refused("sla: no projection fits it", "sla_1: no projection fits it"):
        sla_compile.load_projections(model, projections("{}", blocks=1))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"proj_l.weight": torch.zeros(DIM, DIM + 1)}, f"proj_l.weight: shape ({DIM}, {DIM + 1}), its gate"),
        ({"proj_l.bias": torch.zeros(DIM + 1)}, f"proj_l.bias: shape ({DIM + 1},), its gate"),
        ({"proj_l.weight": None}, "proj_l.weight: missing"),
        ({"proj_l.bias": None}, "proj_l.bias: missing"),
        ({"proj_l.weight": torch.zeros(DIM, DIM, dtype=torch.int8)}, "proj_l.weight: torch.int8; accepted: a tensor"),
        ({"proj_l.weight_scale": torch.zeros(1)}, "proj_l.weight_scale: not the weight or the bias of a proj_l"),
        ({"proj_l.0.weight": torch.zeros(DIM, DIM)}, "proj_l.0.weight: not the weight or the bias of a proj_l"),
    ],
)
def test_projections_that_do_not_fit(changes: dict[str, Tensor | None], problem: str) -> None:
    model, state = prepared(), projections("blocks.{}.attention")
    state |= {f"blocks.1.attention.{name}": value for name, value in changes.items()}  # type: ignore[misc]
    state = {name: value for name, value in state.items() if value is not None}
    with refused("1 problem(s), nothing was changed", f"blocks.1.attention.{problem}"):
        sla_compile.load_projections(model, state)
    assert not any(gate.trained() for gate in sla_compile.gates(model).values())


def test_models_that_are_refused() -> None:
    state = projections("blocks.{}.attention")
    with refused("Model has no SLA gates; accepted: a model after sla_compile.prepare"):
        sla_compile.load_projections(Model(), state)
    with refused("blocks.0.attention.sla: prepared with linear='marginal'; accepted: linear='all'"):
        sla_compile.load_projections(prepared(linear="marginal"), state)
    with refused("blocks.1.attention.sla: prepared with gate='per_head'; accepted: gate='shared'"):
        sla_compile.load_projections(prepared(overrides={"blocks.1.*": {"gate": "per_head"}}), state)
    with refused("no key ends in proj_l.weight"):
        sla_compile.load_projections(prepared(), {"blocks.0.attention.qkv.weight": torch.zeros(3)})
