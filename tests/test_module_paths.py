"""Paths of modules do not change with what is wrapped around them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

from sla_compile.module_paths import all_module_paths, inside, module_paths
from tests.support.models import Model


def test_a_plain_model_has_the_paths_of_named_modules() -> None:
    model = Model()
    assert list(module_paths(model)) == list(model.named_modules())


def test_wrappers_and_what_is_inside_share_a_path() -> None:
    model = Model()
    plain = [path for path, _ in module_paths(model)]
    model.blocks[1] = torch.compile(model.blocks[1], backend="eager")
    whole: nn.Module = nn.DataParallel(model)
    found = list(module_paths(whole))
    assert sorted({path for path, _ in found}) == sorted(plain)
    inside = dict(found)
    assert [module for path, module in found if path == ""] == [whole, model]
    assert [type(module).__name__ for path, module in found if path == "blocks.1"] == ["OptimizedModule", "Block"]
    assert inside["blocks.1.attention"] is model.blocks[1]._orig_mod.attention


def test_a_child_that_is_called_module_keeps_its_name() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(2, 2)

    assert [path for path, _ in module_paths(Holder())] == ["", "module"]


def test_wrappers_of_checkpoints_and_averages_leave_no_name() -> None:
    model = Model()
    plain = {path for path, _ in module_paths(model)}
    block = model.blocks[0]
    model.blocks[0] = checkpoint_wrapper(block)
    assert inside(model.blocks[0]) is block
    assert {path for path, _ in module_paths(AveragedModel(model))} == plain


@pytest.fixture
def adapted() -> Any:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(r=2, target_modules=["qkv"], modules_to_save=["norm"])
    return peft.get_peft_model(Model(), config)


def test_a_model_in_peft_has_the_paths_of_the_plain_model(adapted: Any) -> None:
    found: dict[str, Any] = dict(module_paths(adapted))
    assert found.keys() >= {path for path, _ in module_paths(Model())}
    block: Any = adapted.base_model.model.blocks[0]
    assert found[""] is adapted.base_model.model
    assert found["blocks.0"] is block
    assert found["blocks.0.attention.qkv"] is block.attention.qkv.base_layer
    assert found["blocks.0.norm"] is block.norm.modules_to_save["default"] is inside(block.norm)


def test_of_peft_s_copies_the_one_in_use_is_the_module(adapted: Any) -> None:
    norm = adapted.base_model.model.blocks[0].norm
    copies = {module for path, module in all_module_paths(adapted) if path == "blocks.0.norm"}
    assert copies == {norm, norm.modules_to_save, norm.original_module, norm.modules_to_save["default"]}
    with adapted.disable_adapter():
        assert inside(norm) is norm.original_module
        assert [module for path, module in module_paths(adapted) if path == "blocks.0.norm"][1:] == [inside(norm)]
