"""What a rewrite leaves of the graph around it."""

from __future__ import annotations

import pytest
import torch.nn.functional as F
from torch import Tensor

from tests.support.capture import HEAD_DIM, HEADS, TOKENS, qkv, run
from tests.support.closeness import assert_close

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.mark.parametrize("token_major", [False, True])
def test_a_view_of_the_output_still_works(token_major: bool) -> None:
    """SDPA's output has the layout of whichever kernel ran; a model may view it where that one allowed it."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(q, k, v)
        if y.transpose(1, 2).is_contiguous():
            return y.transpose(1, 2).view(2, TOKENS, HEADS * HEAD_DIM)
        return y.view(2 * HEADS, TOKENS, HEAD_DIM)

    inputs: tuple[Tensor, ...] = qkv()
    if token_major:
        inputs = tuple(x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in inputs)
    capture, output = run(call, *inputs, topk=1.0, bottomk=0.0)
    assert capture.rewritten == 1
    assert_close("viewed output", output, call(*inputs), 1e-5)
