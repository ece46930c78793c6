"""``torch.func`` and a prepared model: what is compiled with sla refuses it by name, all else goes on as without us."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import sla_compile
from tests.support.closeness import assert_close
from tests.support.models import OPTIONS, Model, assert_follows_definition, random_input, randomize_gates

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "float64")

TRANSFORMS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "grad of parameters": lambda model, x: grad(
        lambda parameters: functional_call(model, parameters, (x,)).square().mean()
    )({name: parameter.detach() for name, parameter in model.named_parameters()}),
    "grad": lambda model, x: grad(lambda x: model(x).square().mean())(x),
    "vjp": lambda model, x: vjp(model, x)[1](x),
    "jvp": lambda model, x: jvp(model, (x,), (x,)),
    "vmap": lambda model, x: vmap(model)(x[None]),
}


def prepared() -> tuple[nn.Module, Tensor]:
    model, x = Model(), random_input()
    sla_compile.prepare(model, (x,), config=OPTIONS)
    randomize_gates(model)
    return model, x


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "blocks"])
def test_over_a_compiled_model_it_is_refused(name: str, whole: bool) -> None:
    model, x = prepared()
    run: Any = model
    if whole:
        run = torch.compile(model, backend="sla", options={"inner": "eager"})
    else:
        blocks: Any = model.blocks
        for block in blocks:
            block.compile(backend="sla", options={"inner": "eager"})
    message = r"^blocks\.0\.attention\.sla: Dynamo compiles nothing under torch\.func\.(grad|jvp|vmap), so this gate"
    with pytest.raises(RuntimeError, match=message):
        TRANSFORMS[name](run, x)
    assert_follows_definition(run, model, x)  # what Dynamo gave up once is compiled all the same
    with pytest.raises(RuntimeError, match=message):
        TRANSFORMS[name](run, x)


def test_over_a_model_that_is_not_compiled_it_is_dense() -> None:
    model, x = prepared()
    plain = Model()
    plain.load_state_dict(model.state_dict(), strict=False)
    with sdpa_kernel(SDPBackend.MATH):
        assert_close("gradient", TRANSFORMS["grad"](model, x), TRANSFORMS["grad"](plain, x), 1e-12)


@pytest.mark.parametrize("name", ["grad of parameters", "grad", "vjp"])
def test_inside_a_compiled_function(name: str) -> None:
    """Another backend compiles it as ever; ours refuses it where there is a gate, and keeps the attention where not."""
    model, x = prepared()
    model.requires_grad_(False)

    def step(x: Tensor) -> Any:
        return TRANSFORMS[name](model, x)

    with sdpa_kernel(SDPBackend.MATH):  # torch has no double backward of the others
        wanted = step(x)
        for got, want in zip(_tensors(torch.compile(step, backend="aot_eager")(x)), _tensors(wanted), strict=True):
            assert_close("other backend", got, want, 1e-10)
        with pytest.raises(ValueError, match=r"^blocks\.0\.attention: it has a gate, but is inside a transform"):
            torch.compile(step, backend="sla", options={"inner": "aot_eager"})(x)
        torch._dynamo.reset()
        sla_compile.detach(model)
        ours = torch.compile(step, backend="sla", options={**OPTIONS, "inner": "aot_eager"})(x)
        assert not sla_compile.gates(model)
        for got, want in zip(_tensors(ours), _tensors(step(x)), strict=True):
            assert_close("dense", got, want, 1e-10)
    reasons = {site.reason for site in sla_compile.report(model).sites}
    assert reasons == {"inside a transform of torch.func"}


def _tensors(result: Any) -> list[Tensor]:
    return torch.utils._pytree.tree_leaves(result)
