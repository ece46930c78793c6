"""Files of diffusers around gates: pipelines, transformers and averages are saved and found again, offline."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import sla_compile
from tests.support.closeness import assert_close
from tests.support.models import randomize_gates

pytest.importorskip("diffusers", reason="diffusers is not installed")

import diffusers

from tests.zoo.registry import build, call

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

SETTINGS: dict[str, Any] = {"min_tokens": 32, "block_q": 16, "block_k": 16, "topk": 0.3}
OPTIONS: dict[str, Any] = {"inner": "eager", "min_tokens": 32}
LEFT_BEHIND = "where gates are saved, but its gates are untrained"


def trained(name: str) -> tuple[Any, dict[str, Any]]:
    """A transformer of diffusers with gates that are not zero, and its inputs."""
    model, inputs = build(name)
    sla_compile.prepare(model, (), inputs, config=SETTINGS)
    randomize_gates(model)
    return model, inputs


def sparse(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return call(torch.compile(model, backend="sla", options=OPTIONS), inputs)


@pytest.fixture
def pipeline() -> Any:
    transformer, _ = trained("DiTTransformer2DModel")
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=transformer.config.in_channels, sample_size=16
    )
    return diffusers.DiTPipeline(transformer=transformer, vae=vae, scheduler=diffusers.DDIMScheduler())


def test_gates_beside_the_transformer_of_a_pipeline(pipeline: Any, tmp_path: Path) -> None:
    _, inputs = build("DiTTransformer2DModel")
    pipeline.save_pretrained(tmp_path)
    sla_compile.save(pipeline.transformer, tmp_path / "transformer")
    again = diffusers.DiTPipeline.from_pretrained(tmp_path)
    assert not sla_compile.gates(again.transformer), "diffusers leaves them out"
    sla_compile.load(again.transformer, tmp_path / "transformer")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*gates")
        assert_close("transformer", sparse(again.transformer, inputs), sparse(pipeline.transformer, inputs), 1e-5)


def test_gates_that_from_pretrained_left_out_are_told_of_at_the_first_compile(tmp_path: Path) -> None:
    """Their file need not be there: the weights hold them too."""
    saved, inputs = trained("DiTTransformer2DModel")
    saved.save_pretrained(tmp_path / "transformer")
    folder = str(tmp_path / "transformer")
    model = type(saved).from_pretrained(tmp_path, subfolder="transformer")
    with pytest.warns(sla_compile.UntrainedGatesWarning, match=LEFT_BEHIND) as told:
        sparse(model, inputs)
    assert sum(folder in str(warning.message) for warning in told) == 1
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=f".*{LEFT_BEHIND}")
        sparse(model, inputs)


def test_blocks_of_a_prepared_model_know_its_folder(tmp_path: Path) -> None:
    model, inputs = trained("WanTransformer3DModel")
    model.save_pretrained(tmp_path)
    left, loaded = (type(model).from_pretrained(tmp_path) for _ in range(2))
    for other in (left, loaded):
        sla_compile.prepare(other, (), inputs, config=SETTINGS)
        other.compile_repeated_blocks(backend="sla", options=OPTIONS)
    loaded.load_state_dict(model.state_dict())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=f".*{LEFT_BEHIND}")
        with torch.no_grad():
            assert_close("blocks", call(loaded, inputs), sparse(model, inputs), 1e-5)
    torch._dynamo.reset()
    with torch.no_grad(), pytest.warns(sla_compile.UntrainedGatesWarning, match=LEFT_BEHIND):
        call(left, inputs)


def test_an_average_is_saved_as_the_model_that_it_is_of(tmp_path: Path) -> None:
    """``EMAModel.save_pretrained`` makes a model without gates and fails; this is the way of docs/saving.md."""
    from diffusers.training_utils import EMAModel

    model, inputs = trained("DiTTransformer2DModel")
    ema = EMAModel(model.parameters(), decay=0.5, model_cls=type(model), model_config=model.config)
    with pytest.raises((RuntimeError, ValueError)):
        ema.save_pretrained(tmp_path / "fails")
    randomize_gates(model)
    ema.step(model.parameters())
    now = copy.deepcopy(model.state_dict())

    ema.store(model.parameters())
    ema.copy_to(model.parameters())
    averaged = copy.deepcopy(model)
    model.save_pretrained(tmp_path)
    sla_compile.save(model, tmp_path)
    ema.restore(model.parameters())
    assert all(torch.equal(tensor, now[name]) for name, tensor in model.state_dict().items())

    again = sla_compile.load(type(model).from_pretrained(tmp_path), tmp_path)
    assert_close("average", sparse(again, inputs), sparse(averaged, inputs), 1e-5)
    resumed = EMAModel(again.parameters())
    resumed.load_state_dict(ema.state_dict())
    for ours, theirs in zip(resumed.shadow_params, ema.shadow_params, strict=True):
        assert torch.equal(ours, theirs)
