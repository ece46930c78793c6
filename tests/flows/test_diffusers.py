"""Real diffusers transformers, small: at topk=1 exactly dense attention, below it right gates with gradients.

The examples are those of tests/zoo/; ``python -m benchmarks.zoo`` runs all of them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import sla_compile
from tests.support.closeness import assert_close

pytest.importorskip("diffusers", reason="diffusers is not installed")

from tests.zoo.registry import EXAMPLES, build, call, transformer_classes
from tests.zoo.wan import wan_config, wan_inputs

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

OPTIONS: dict[str, Any] = {"inner": "eager", "min_tokens": 32, "block_q": 16, "block_k": 16}

REWRITTEN = {
    "WanTransformer3DModel": 2,
    "FluxTransformer2DModel": 2,
    "SD3Transformer2DModel": 3,
    "CogVideoXTransformer3DModel": 2,
}
"""Attentions that become sparse, of each class tested with gradients."""

DENSE_ONLY = {
    "LTXVideoTransformer3DModel": 1,
    "LatteTransformer3DModel": 1,
    "DiTTransformer2DModel": 1,
    "PixArtTransformer2DModel": 1,
    "AuraFlowTransformer2DModel": 2,
    "ChromaTransformer2DModel": 2,
    "CogView4Transformer2DModel": 1,
    "Kandinsky5Transformer3DModel": 1,
    "ZImageTransformer2DModel": 4,
    "SkyReelsV2Transformer3DModel": 1,
    "HunyuanVideoTransformer3DModel": 2,
    "HunyuanVideo15Transformer3DModel": 1,
    "HunyuanImageTransformer2DModel": 2,
    "ErnieImageTransformer2DModel": 1,
    "Krea2Transformer2DModel": 1,
    "LongCatAudioDiTTransformer": 1,
    "LuminaNextDiT2DModel": 1,
    "MiniMaxMusic3RVQDepthDecoder": 1,
}
"""The same of each class tested at topk=1 alone."""


TEXT: dict[str, tuple[tuple[int, ...] | None, tuple[int, ...]]] = {
    "FluxTransformer2DModel": ((10, 10), (0, 12)),
    "SD3Transformer2DModel": (None, (144, 156)),
    "CogVideoXTransformer3DModel": (None, (0, 12)),
    "AuraFlowTransformer2DModel": ((12, 12), (0, 20)),  # with its registers
    "ChromaTransformer2DModel": ((10, 10), (0, 12)),
    "CogView4Transformer2DModel": ((12, 12), (0, 12)),
    "HunyuanVideoTransformer3DModel": (None, (192, 204)),
    "HunyuanVideo15Transformer3DModel": ((2, 8, 8), (128, 141)),
    "HunyuanImageTransformer2DModel": (None, (144, 156)),
    "ErnieImageTransformer2DModel": (None, (144, 156)),
}
"""Of classes that join text and video: the grid, where their graph does not show it, and the tokens of the text."""


READ_VALUES = [
    ("HiDreamImageTransformer2DModel", 2, 2),
    ("HunyuanVideoFramepackTransformer3DModel", 3, 2),
    ("QwenImage21Transformer2DModel", 2, 0),
]
"""Classes whose forward goes by values that a graph made; their attentions, and how many are rewritten."""


@pytest.mark.parametrize("name", [*REWRITTEN, *DENSE_ONLY])
def test_topk_of_one_is_dense_attention(name: str) -> None:
    model, inputs = build(name)
    options = OPTIONS | {"topk": 1.0, "bottomk": 0.0}
    if name in TEXT:
        options |= {"always_critical": "text", "grid": TEXT[name][0]}
    compiled = torch.compile(model, backend="sla", options=options)
    with torch.no_grad():
        dense = call(model, inputs)
        sparse = call(compiled, inputs)
    sites = {**REWRITTEN, **DENSE_ONLY}[name]
    if name in TEXT:  # but for attention of the image to itself
        found = {site.critical_tokens for site in sla_compile.report(model).sites if site.rewritten}
        assert found - {()} == {TEXT[name][1]}
    assert len(sla_compile.gates(model)) == sites
    assert sum(site.rewritten for site in sla_compile.report(model).sites) == sites
    assert_close(name, sparse, dense, 1e-5)


def test_frames_that_see_earlier_frames_alone_are_rewritten_chunk_by_chunk() -> None:
    model = transformer_classes()["SkyReelsV2Transformer3DModel"](**wan_config(num_frame_per_block=2)).eval()
    inputs = wan_inputs(frames=4)
    compiled = torch.compile(model, backend="sla", options=OPTIONS | {"topk": 1.0, "bottomk": 0.0})
    with torch.no_grad():
        assert_close("output", call(compiled, inputs), call(model, inputs), 1e-5)
    (site,) = (site for site in sla_compile.report(model).sites if site.rewritten)
    assert site.segments == ((0, 128, 0, 128), (128, 256, 0, 256))


def test_mochi_is_rewritten_where_dynamo_follows_its_count_of_text_tokens() -> None:
    model, inputs = build("MochiTransformer3DModel")
    options = OPTIONS | {"topk": 1.0, "bottomk": 0.0}
    with torch.no_grad(), torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        dense = call(model, inputs)
        compiled = torch.compile(model, backend="sla", options=options, fullgraph=True)
        assert_close("output", call(compiled, inputs), dense, 1e-5)
    assert len(sla_compile.gates(model)) == 1


@pytest.mark.parametrize("name", REWRITTEN)
def test_every_gate_gets_a_gradient(name: str) -> None:
    model, inputs = build(name)
    settings = {key: value for key, value in OPTIONS.items() if key != "inner"}
    sla_compile.prepare(model, (), inputs, config=settings)
    compiled = torch.compile(model, backend="sla", options={"inner": "aot_eager"})
    with torch.no_grad():
        for parameter in sla_compile.gate_parameters(model):
            parameter.normal_()
    call(compiled, inputs).square().mean().backward()
    for path, gate in sla_compile.gates(model).items():
        for parameter in gate.parameters():
            assert parameter.grad is not None, path
            assert parameter.grad.isfinite().all(), path
            assert parameter.grad.norm() > 0, path


def test_cross_attention_of_wan_stays_dense_with_its_reason() -> None:
    model, inputs = build("WanTransformer3DModel")
    report = sla_compile.explain(model, (), inputs, config={"min_tokens": 64}).to_dict()
    decisions = {site["path"]: (site["rewritten"], site["reason"]) for site in report["sites"]}
    assert decisions == {
        "blocks.0.attn1": (True, "self-attention"),
        "blocks.0.attn2": (False, "cross-attention"),
        "blocks.1.attn1": (True, "self-attention"),
        "blocks.1.attn2": (False, "cross-attention"),
    }
    assert not sla_compile.gates(model)


CROSS = {
    "WanTransformer3DModel": (4, 0),
    "LTXVideoTransformer3DModel": (2, 1),  # its mask is repeated for every head
    "CosmosTransformer3DModel": (2, 1),
    "AceStepTransformer1DModel": (3, 0),  # grouped heads
}
"""Attentions rewritten with cross_attention=True, and how many of them have a mask."""


@pytest.mark.parametrize("name", CROSS)
def test_cross_attention_on_request(name: str) -> None:
    model, inputs = build(name)
    options = {**OPTIONS, "min_tokens": 0, "cross_attention": True}
    compiled = torch.compile(model, backend="sla", options=options | {"topk": 1.0, "bottomk": 0.0})
    with torch.no_grad():
        dense, sparse = call(model, inputs), call(compiled, inputs)
    rewritten = [site for site in sla_compile.report(model).sites if site.rewritten]
    assert (len(rewritten), sum(bool(site.mask) for site in rewritten)) == CROSS[name]
    assert_close(name, sparse, dense, 1e-5)


MASKS = {
    "HunyuanVideoTransformer3DModel": ["bool (1, 1, 1, 204)"] * 2,
    "LuminaNextDiT2DModel": ["bool (1, 4, 144, 144)"],
    "HunyuanVideo15Transformer3DModel": ["bool (1, 1, 141, 141)"],
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_of_text_that_is_padded(name: str) -> None:
    """HunyuanVideo's is over keys, Lumina's an expand of one, HunyuanVideo 1.5's a product."""
    model, inputs = build(name)
    sites = sla_compile.explain(model, (), inputs, config=OPTIONS).sites
    assert [site.mask for site in sites if site.rewritten and site.mask] == MASKS[name]


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_chroma_with_its_mask(dtype: torch.dtype) -> None:
    """A bool one masks; the numbers that its pipeline passes are added to the scores, and mask nothing."""
    model, inputs = build("ChromaTransformer2DModel")
    tokens = inputs["hidden_states"].shape[1] + inputs["encoder_hidden_states"].shape[1]
    inputs["attention_mask"] = ((torch.arange(tokens) < 5) | (torch.arange(tokens) >= 12)).to(dtype)[None]
    compiled = torch.compile(model, backend="sla", options=OPTIONS | {"topk": 1.0, "bottomk": 0.0})
    with torch.no_grad():
        assert_close("masked", call(compiled, inputs), call(model, inputs), 1e-5)
    sites = sla_compile.report(model).sites
    kept = {site.reason for site in sites if not site.rewritten}
    assert len(sites) == 2
    assert kept == (set() if dtype == torch.bool else {"product of masks that is added to the scores"})


@pytest.mark.parametrize(("name", "sites", "rewritten"), READ_VALUES)
def test_explained_though_python_reads_values_after_a_break(name: str, sites: int, rewritten: int) -> None:
    model, inputs = build(name)
    report = sla_compile.explain(model, (), inputs, config=OPTIONS)
    assert (len(report.sites), report.totals.rewritten) == (sites, rewritten)
    assert not any("the trace stopped" in found.reason for found in report.graph_breaks)
    torch.compile(model, backend="sla", options=OPTIONS)(**inputs)
    totals = sla_compile.report(model).totals
    assert (totals.attentions, totals.rewritten) == (sites, rewritten)


def test_compile_repeated_blocks() -> None:
    model, inputs = build("WanTransformer3DModel")
    with torch.no_grad():
        dense = call(model, inputs)
        repeated: Any = model
        repeated.compile_repeated_blocks(backend="sla", options=OPTIONS | {"topk": 1.0, "bottomk": 0.0})
        sparse = call(model, inputs)
    assert len(sla_compile.gates(model)) == REWRITTEN["WanTransformer3DModel"]
    assert_close("regional", sparse, dense, 1e-5)


def test_every_example_is_of_a_class_of_diffusers() -> None:
    assert not EXAMPLES.keys() - transformer_classes().keys()
