"""Paths of modules do not change with what is wrapped around them."""

from __future__ import annotations

import torch
from torch import nn

from sla_compile.module_paths import module_paths
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
