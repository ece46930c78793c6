"""Every kernel compiles for Hopper under every option, without a GPU: the interpreter takes what Triton refuses."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import re
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.support.triton_cases import Case, inputs, run_kernels

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(sys.platform != "linux", reason="Triton's assembler is for Linux"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted here"),
]

TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


def descriptor_type(descriptor: Any) -> str:
    """A tensor descriptor as Triton's signatures spell it."""
    return f"tensordesc<{TYPES[descriptor.base.dtype][1:]}{list(descriptor.block_shape)},{descriptor.layout!r}>"


def source_of(kernel: Any, arguments: dict[str, Any]) -> Any:
    """What Triton, or Gluon, would compile for these arguments of a launch."""
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
        value = arguments[name]
        one = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or one or value is None:
            signature[name], constants[i,] = "constexpr", value
            continue
        aligned = isinstance(value, int) and value % 16 == 0 and not parameter.do_not_specialize
        if isinstance(value, torch.Tensor) or aligned:
            attributes[i,] = [["tt.divisibility", 16]]
        if isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
        elif hasattr(value, "block_shape"):
            signature[name] = descriptor_type(value)
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        else:
            assert isinstance(value, float), name
            signature[name] = "fp32"
    source = GluonASTSource if kernel.is_gluon() else ASTSource
    return source(kernel, signature, constants, attributes)


SHARED_MEMORY = 232448
"""Bytes that one program may have on an H100."""

CASES = [
    Case(tokens=70, keys=50, head_dim=72, mask="moderate", always=(0, 10), sparsity=(100_000, 100_000)),
    Case(tokens=70, heads=4, group=2, head_dim=32, causal=True, linear="all", feature_map="elu"),
    Case(tokens=70, head_dim=32, feature_map="relu", bias="none"),
    Case(tokens=70, head_dim=32, weight="none", causal=True, mask="bool", sparsity=(100_000, 100_000)),
    Case(tokens=70, heads=6, group=3, linear="taylor", head_dim=72, mask="moderate"),
]
"""Each branch of each kernel in one of them, grouped queries too, and not every combination."""


HOPPER_CASES = [
    (
        Case(tokens=300, heads=4, group=2, head_dim=72, block_q=256, block_k=128, linear="all", causal=True),
        torch.bfloat16,
    ),
    (Case(tokens=300, head_dim=128, feature_map="elu"), torch.bfloat16),
    (
        Case(tokens=300, heads=6, group=3, block_q=128, feature_map="relu", mask="bool", sparsity=(100_000, 100_000)),
        torch.float16,
    ),
    (Case(tokens=300, keys=200, head_dim=128, block_k=128, weight="none"), torch.bfloat16),
    (Case(tokens=300, heads=4, group=4, head_dim=128, block_q=128, block_k=128, linear="taylor"), torch.bfloat16),
    (Case(tokens=300, head_dim=128, mask="bool", linear="taylor"), torch.float16),
    (Case(tokens=300, heads=4, group=2, head_dim=200, block_q=128, block_k=128, linear="all"), torch.float16),
    (Case(tokens=300, head_dim=256, feature_map="elu"), torch.bfloat16),
]
"""Likewise. The first has the largest tiles, of which the second fills the shared memory without room to write out."""


def read_twice(ttgir: str) -> set[str]:
    """Buffers of a pipelined loop that registers read, and a product that is not waited for: Triton makes too few."""
    views = dict(re.findall(r"(%\S+) = ttg\.memdesc_(?:index|trans) (%[\w-]+)", ttgir))

    def buffer(name: str) -> str:
        return buffer(views[name]) if name in views else name

    loaded = {buffer(name) for name in re.findall(r"ttg\.local_load (%[\w-]+)", ttgir)}
    products = re.findall(r"ttng\.warp_group_dot (%[\w-]+), (%[\w-]+)", ttgir)
    buffers = set(re.findall(r"(%\S+) = ttg\.local_alloc : \(\)", ttgir))
    return buffers & loaded & {buffer(name) for pair in products for name in pair}


def unused_barriers(ttgir: str) -> set[str]:
    """Barriers that are made and then not used: Triton puts other values where they lie (docs/architecture.md)."""
    views = dict(re.findall(r"(%\S+) = ttg\.memdesc_index (%[\w-]+)", ttgir))

    def barrier(name: str) -> str:
        return barrier(views[name]) if name in views else name

    making = re.compile(r"= ttg\.(?:local_alloc|memdesc_index) |ttng\.init_barrier ")
    using = "\n".join(line for line in ttgir.splitlines() if not making.search(line))
    made = {barrier(name) for name in re.findall(r"ttng\.init_barrier (%[\w-]+)", ttgir)}
    return made - {barrier(name) for name in re.findall(r"%[\w-]+", using)}


def compile_launches(
    monkeypatch: pytest.MonkeyPatch, capability: int = 90, shared_memory: int = SHARED_MEMORY
) -> list[str]:
    """From now on a launch compiles for a GPU, an H100, and goes no further; the names of the kernels launched."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    compiled: list[str] = []

    def launcher(kernel: Any, grid: Any) -> Any:
        def launch(
            *arguments: Any, num_warps: int = 4, num_stages: int = 3, maxnreg: int | None = None, **constants: Any
        ) -> None:
            source = source_of(kernel, dict(zip(kernel.arg_names, arguments, strict=False)) | constants)
            options = {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": maxnreg}
            binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
            assert binary.metadata.shared <= shared_memory, kernel.fn.__name__
            assert kernel.is_gluon() or not read_twice(binary.asm["ttgir"]), kernel.fn.__name__
            assert not kernel.is_gluon() or not unused_barriers(binary.asm["ttgir"]), kernel.fn.__name__
            compiled.append(kernel.fn.__name__)

        return launch

    monkeypatch.setattr(JITFunction, "__getitem__", launcher)
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: contextlib.nullcontext())
    return compiled


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_launch_compiles(case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = compile_launches(monkeypatch)
    run_kernels(case, inputs(case, dtype, "cpu"))
    assert {"attention_forward_kernel", "attention_backward_query_kernel", "attention_backward_key_kernel"} <= {
        *compiled
    }


@pytest.mark.parametrize("head_dim", [128, 256])
def test_every_launch_fits_a_smaller_gpu(head_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ada, as an RTX 4090, and the small Blackwells give a program 99 KiB of shared memory."""
    compiled = compile_launches(monkeypatch, 89, 99 * 1024)
    case = Case(tokens=70, head_dim=head_dim)
    run_kernels(case, inputs(case, torch.bfloat16, "cpu"))
    assert {"attention_forward_kernel", "key_state_kernel", "gate_gradient_kernel"} <= {*compiled}
    virtual = replace(case, block_q=128, block_k=128, linear="taylor")
    run_kernels(virtual, inputs(virtual, torch.bfloat16, "cpu"))
    assert {"key_moment_kernel", "virtual_forward_kernel", "virtual_backward_key_kernel"} <= {*compiled}


def test_wide_heads_fit_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sparse part alone, whose loops fill the shared memory."""
    from sla_compile.kernels.triton import tiles

    compiled = compile_launches(monkeypatch)
    monkeypatch.setattr(tiles, "on_hopper", lambda: True)
    assert tiles.launch_for("forward", 256, torch.bfloat16, 128, 128).tile_q == 128  # 64 on other GPUs
    masked = Case(tokens=300, head_dim=256, block_q=128, block_k=128, mask="bool", causal=True)
    case = replace(masked, weight="none", bias="none")
    run_kernels(case, inputs(case, torch.bfloat16, "cpu"))
    assert {"attention_forward_kernel", "attention_backward_query_kernel"} <= {*compiled}
    assert compiled.count("attention_backward_key_kernel") == 2, "dK and dV have a launch each"


@pytest.mark.parametrize(
    ("case", "dtype", "cut"), [*((*case, True) for case in HOPPER_CASES), (*HOPPER_CASES[3], False)], ids=str
)
def test_every_launch_of_gluon_compiles(
    case: Case, dtype: torch.dtype, cut: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ``cut``, for so few columns that long ones are cut, which with many more are not."""
    from sla_compile.kernels.hopper import backward_key, primitives
    from sla_compile.kernels.hopper import support as hopper

    compiled = compile_launches(monkeypatch)
    monkeypatch.setattr(hopper, "usable", lambda *tensors, **settings: True)
    backward = ("backward_query", "backward_key", "linear_backward", "virtual_keys")
    for user in ("states", "moments", "forward", "wide_query", "wide_key", *backward):
        module = importlib.import_module(f"sla_compile.kernels.hopper.{user}")
        assert module.multiprocessors is primitives.multiprocessors
        monkeypatch.setattr(module, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(backward_key, "worth_cutting", lambda columns, programs: cut)
    run_kernels(case, inputs(case, dtype, "cpu"))
    wide = "wide_" if case.head_dim > 128 else ""
    expected = {"attention_forward_kernel", f"{wide}query_kernel", f"{wide}key_kernel"}
    expected.add("column_parts_kernel" if cut and not wide else "longest_first_kernel")
    if wide:
        expected |= {"key_state_kernel", "linear_backward_kernel"}
    elif case.weight != "none" and case.linear != "taylor":
        expected |= {"states_kernel", "linear_kernel"}
    if case.linear == "taylor":
        expected |= {"moments_kernel", "virtual_key_kernel"}
    assert expected <= {*compiled}
    in_triton = {"attention_backward_key_kernel", "key_state_kernel", "key_moment_kernel", "key_gradient_kernel"}
    if wide:
        in_triton.remove("key_state_kernel")
    assert not (in_triton | {"virtual_backward_query_kernel", "virtual_backward_key_kernel"}) & {*compiled}
