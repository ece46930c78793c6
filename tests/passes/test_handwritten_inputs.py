"""Queries, keys and values of a hand-written attention: their precision, and heads that are part of the batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.passes.test_handwritten import BATCH, SCALE, merged_by_split, older_processor, scores, upcast
from tests.support.capture import HEAD_DIM, HEADS, TOKENS, qkv, run
from tests.support.closeness import assert_close

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def test_low_precision_tensors_are_read_before_their_casts() -> None:
    """What a float32 softmax asked for is what the op does inside: no float32 copy of queries and keys is left."""
    inputs = qkv(dtype=torch.bfloat16)
    capture, output = run(upcast, *inputs, topk=1.0, bottomk=0.0)
    assert capture.rewritten == 1
    assert capture.count("float") == 0
    assert output.dtype == torch.bfloat16
    call = capture.sites[0].call
    assert {str(side.meta["example_value"].dtype) for side in (call.query, call.key, call.value)} == {"torch.bfloat16"}
    assert_close("topk=1 is dense attention", output, upcast(*inputs), 1e-2)


def test_mixed_precision_takes_the_wider() -> None:
    q, k, v = qkv()
    inputs = q, k, v.bfloat16()

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (scores(q, k) * SCALE).softmax(-1).to(v.dtype) @ v

    capture, output = run(call, *inputs, topk=1.0, bottomk=0.0)
    assert capture.rewritten == 1
    assert output.dtype == torch.bfloat16
    assert_close("topk=1 is dense attention", output, call(*inputs), 1e-2)


def test_merged_heads_are_rewritten_by_heads_where_they_are_seen() -> None:
    capture, _ = run(older_processor, *qkv())
    assert capture.sites[0].call.query.meta["example_value"].shape == (BATCH, HEADS, TOKENS, HEAD_DIM)
    assert not capture.sites[0].call.restore, "the op's output goes where the output by heads was"
    capture, _ = run(older_processor, *qkv(), linear="marginal", gate="per_head")
    assert capture.rewritten == 1
    gate = capture.sites[0].gate
    assert gate is not None
    assert gate.weight.shape == (HEADS, HEAD_DIM, HEAD_DIM)


def test_merged_heads_that_are_not_seen_have_one_gate_or_none() -> None:
    capture, _ = run(merged_by_split, *qkv())
    assert capture.sites[0].call.query.meta["example_value"].shape == (BATCH * HEADS, 1, TOKENS, HEAD_DIM)
    capture, output = run(merged_by_split, *(inputs := qkv()), linear="marginal", gate="per_head")
    assert capture.rewritten == 0
    assert "batch and heads are one axis" in str(capture.sites[0].decision)
    assert torch.equal(output, merged_by_split(*inputs))
