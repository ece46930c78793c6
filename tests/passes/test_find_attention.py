"""Every call form of attention is found and rewritten."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sla_compile.passes.decide import Rewrite
from tests.support.capture import qkv, run
from tests.support.closeness import assert_close

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


REWRITTEN: dict[str, Callable[..., Tensor]] = {
    "positional": lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
    "keywords": lambda q, k, v: F.scaled_dot_product_attention(value=v, key=k, query=q),
    "all positional": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, None, 0.0, False),
    "defaults spelled out": lambda q, k, v: F.scaled_dot_product_attention(
        q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
    ),
    "scale": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.3),
    "integer scale": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=1),
    "aten packet": lambda q, k, v: torch.ops.aten.scaled_dot_product_attention(q, k, v, scale=0.3),
    "aten overload": lambda q, k, v: torch.ops.aten.scaled_dot_product_attention.default(q, k, v, None, 0.0),
    "dropout of 0 as an integer": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0),
}


@pytest.mark.parametrize("form", REWRITTEN)
def test_every_call_form_is_rewritten(form: str) -> None:
    call, inputs = REWRITTEN[form], qkv()
    capture, output = run(call, *inputs, topk=1.0, bottomk=0.0)
    assert (capture.rewritten, capture.kept) == (1, 0)
    assert capture.count(torch.ops.sla.gate) == 0, "markers are erased"
    assert isinstance(capture.sites[0].decision, Rewrite)
    assert_close("topk=1 is dense attention", output, call(*inputs), 1e-5)
    # With topk below 1 it is another function: the identity above was not dense attention left in place.
    assert (run(call, *inputs)[1] - call(*inputs)).norm() > 0.01
