"""What is remembered is found again, and goes with what it is about."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from sla_compile import memory
from sla_compile.compiler.site_report import GraphBreak, SiteReport
from sla_compile.gate_settings import NumberedSite

SITE = SiteReport(path="a", owner="Linear", ordinal=0, rewritten=True, reason="self-attention")


def a_code() -> CodeType:
    """A code object that nothing else holds."""
    made: dict[str, Any] = {}
    exec("def forward(self): return self", made)
    function = made["forward"]
    assert isinstance(function, FunctionType)
    return function.__code__


def test_a_gate_is_awaited_until_it_is_forgotten() -> None:
    owner = nn.Linear(2, 2)
    memory.await_marker(owner, 1)
    assert memory.is_awaited(owner, 1)
    assert not memory.is_awaited(owner, 0)
    memory.forget_awaited(owner, 1)
    assert not memory.is_awaited(owner, 1)
    memory.forget_awaited(nn.Linear(2, 2), 0)


def test_dense_code_is_taken_once() -> None:
    owner, code = nn.Linear(2, 2), a_code()
    memory.remember_dense(owner, code)
    assert memory.take_dense_code(owner) == {code}
    assert memory.take_dense_code(owner) == set()


def test_a_copy_of_an_injected_gate_was_not_injected() -> None:
    gate, other = nn.Linear(2, 2), nn.Linear(2, 2)
    memory.remember_injected(gate)
    assert memory.was_injected(gate)
    assert not memory.was_injected(other)


def test_accounts_by_owner_class_and_code() -> None:
    class Owner(nn.Module):
        pass

    owner, code = Owner(), a_code()
    memory.remember_owner_account(owner, owner, 0, (SITE,))
    memory.remember_owner_account(owner, None, 0, (SITE,))
    assert memory.accounts_of_owner(owner) == {(weakref.ref(owner), 0): [(SITE,)], (None, 0): [(SITE,)]}
    assert memory.accounts_of_owner(Owner()) == {}
    memory.remember_class_account(Owner, "a", 0, "{}", (SITE,))
    assert memory.accounts_of_class(Owner) == {("a", 0, "{}"): [(SITE,)]}
    assert memory.accounts_of_class(nn.Linear) == {}
    memory.remember_code_accounts(code, [SITE])
    assert (code, [SITE]) in list(memory.accounts_by_code())
    memory.remember_code_accounts(code, [])
    assert code not in dict(memory.accounts_by_code())


def test_a_break_is_listed_once() -> None:
    root, found = nn.Linear(2, 2), GraphBreak("print")
    memory.remember_break(root, found)
    memory.remember_break(root, GraphBreak("print"))
    assert memory.breaks_in(root) == [found]


def test_a_folder_is_known_unknown_or_none() -> None:
    owner = nn.Linear(2, 2)
    assert memory.gate_folder(owner) is None
    for folder in ("folder", ""):
        memory.remember_gate_folder(owner, folder)
        assert memory.gate_folder(owner) == folder


def test_everything_goes_with_its_key() -> None:
    weak = (weakref.WeakKeyDictionary, weakref.WeakSet)
    registries: dict[str, Any] = {name: value for name, value in vars(memory).items() if isinstance(value, weak)}
    assert len(registries) == 18
    gc.collect()
    before = {name: len(registry) for name, registry in registries.items()}
    owner, code = type("Owner", (nn.Module,), {})(), a_code()
    memory.await_marker(owner, 0)
    memory.remember_dense(owner, code)
    memory.remember_injected(owner)
    memory.remember_unproven(code, owner, owner, 0)
    memory.remember_site(owner, 0, NumberedSite("forward+1", True))
    memory.remember_limit_callback(code, print)
    assert memory.settings_of_last_compile(code, "{}") == ""
    assert memory.settings_of_last_compile(code, "") == "{}"
    memory.remember_owner_account(owner, owner, 0, (SITE,))
    memory.remember_class_account(type(owner), "a", 0, "{}", (SITE,))
    memory.remember_code_accounts(code, [SITE])
    memory.remember_break(owner, GraphBreak("print"))
    memory.remember_told(owner, "dense")
    memory.remember_gate_folder(owner, "folder")
    memory.remember_backend(nothing := lambda: None)
    memory.remember_start(owner)
    memory.remember_eager_start(owner)
    memory.remember_dense_run(owner, compiled=True)
    assert all(len(registry) == before[name] + 1 for name, registry in registries.items())
    del owner, code, nothing
    gc.collect()
    assert {name: len(registry) for name, registry in registries.items()} == before


def test_what_other_sizes_gave_is_kept_and_what_is_superseded_goes() -> None:
    owner = nn.Linear(2, 2)

    def rows() -> list[tuple[bool, int]]:
        return [(r.rewritten, r.traced["tokens"]) for (r,) in memory.accounts_of_owner(owner)[None, 0]]

    def compiled(rewritten: bool, tokens: int) -> None:
        report = replace(SITE, rewritten=rewritten, reason="" if rewritten else "short", traced={"tokens": tokens})
        memory.remember_owner_account(owner, None, 0, (report,))

    compiled(True, 96)
    compiled(False, 32)
    assert rows() == [(True, 96), (False, 32)]
    compiled(True, 128)  # of two that were rewritten, the last
    assert rows() == [(False, 32), (True, 128)]
    compiled(False, 128)  # at the same size, the last
    assert rows() == [(False, 128)]


def test_a_run_after_the_start_of_a_call() -> None:
    module = nn.Linear(2, 2)
    memory.remember_start(module)
    first = memory.last_start(module)
    assert first > 0 == memory.last_start(nn.Linear(2, 2))
    assert not memory.ran_since_start(module)
    memory.count_run()
    assert memory.ran_since_start(module)
    memory.remember_dense_run(module, compiled=True)
    when, compiled = memory.dense_run(module)
    assert when > first
    assert compiled
    memory.clear_dense_run(module)
    assert memory.dense_run(module) == (0, False)


def test_an_eager_run_is_remembered_unless_it_is_measured() -> None:
    module = nn.Linear(2, 2)
    assert memory.ran_since_eager_start(module)  # of a start that nobody saw, nothing is told
    memory.remember_eager_start(module)
    assert not memory.ran_since_eager_start(module)
    with memory.eager_runs_are_measured():
        memory.remember_dense_run(module, compiled=False)
    assert memory.dense_run(module) == (0, False)
    memory.remember_dense_run(module, compiled=False)
    assert memory.dense_run(module)[0] > 0
    memory.count_run()
    assert memory.ran_since_eager_start(module)


def test_a_module_is_told_once() -> None:
    module = nn.Linear(2, 2)
    memory.remember_told(module, "dense")
    assert memory.was_told(module, "dense")
    assert not memory.was_told(module, "zero gates")
    assert not memory.was_told(nn.Linear(2, 2), "dense")


def test_backends_are_known_by_identity() -> None:
    def backend() -> None: ...

    assert not memory.is_our_backend(backend)
    memory.remember_backend(backend)
    assert memory.is_our_backend(backend)
    assert not memory.is_our_backend([])  # has no hash
