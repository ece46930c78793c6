"""The file of launches that a user chose: what is accepted in it, and what it does to a launch."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sla_compile.common.kernel_interface import AttentionInputs, ForwardResult
from sla_compile.compiler import precompile as ahead
from sla_compile.kernels.triton import launches
from sla_compile.kernels.triton.launches import KERNELS, VARIABLE, Key, Launch, merge, read
from sla_compile.kernels.triton.tiles import launch_for, shipped_launch
from tests.compiler.test_precompile import HOPPER, job_of
from tests.support.launches import HALF, OURS, entry, on_device
from tests.support.triton_cases import Case, inputs

pytestmark = pytest.mark.usefixtures("nothing_read")


def test_a_launch_of_the_file_is_in_force_on_its_gpu_alone(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text(json.dumps(entry()))
    use = on_device(monkeypatch, (8, 9), (9, 0))
    shipped = shipped_launch("forward", 64, "half")
    for _ in range(2):
        use(0)
        assert launch_for("forward", *HALF) == OURS
        use(1)
        assert launch_for("forward", *HALF) == shipped != OURS


def test_what_the_file_does_not_name_keeps_the_shipped_launch(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_device(monkeypatch, (8, 9))
    file.write_text(json.dumps(entry()))
    for kernel in KERNELS[:1] + KERNELS[2:]:
        assert launch_for(kernel, *HALF) == shipped_launch(kernel, 64, "half")
    assert launch_for("forward", 64, torch.float32, 64, 64) == shipped_launch("forward", 64, "single")
    assert launch_for("forward", 128, torch.float16, 64, 64) == shipped_launch("forward", 128, "half")
    assert launch_for("forward", 40, torch.float16, 64, 64) == OURS
    # no tile larger than its block, no more columns than there are
    assert launch_for("forward", 16, torch.float16, 16, 64) == replace(OURS, tile_q=16, chunk=16)


def test_wide_heads_have_launches_of_their_own_on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those whose tiles fit the blocks; a program of other GPUs has not the shared memory for them."""
    use = on_device(monkeypatch, (9, 0), (8, 9))
    half = torch.bfloat16
    assert launch_for("forward", 136, half, 128, 128) == Launch(128, 64, 64, 8, 2)
    assert launch_for("backward_query", 256, half, 128, 32) == Launch(128, 32, 64, 8, 3)
    assert launch_for("backward_query", 256, half, 64, 64) == Launch(64, 64, 64, 8, 2)
    elsewhere = [("forward", 256, half, 64, 64), ("backward_key", 256, half, 32, 64), ("states", 256, half, 64, 64)]
    elsewhere += [(kernel, 128, half, 128, 128) for kernel in KERNELS]
    elsewhere += [(kernel, 256, torch.float32, 128, 128) for kernel in KERNELS]
    on_hopper = [launch_for(*call) for call in elsewhere]
    use(1)
    assert on_hopper == [launch_for(*call) for call in elsewhere]
    assert launch_for("forward", 256, half, 128, 128) == Launch(64, 32, 32, 4, 2)


def test_read_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_device(monkeypatch, (8, 9))
    file.write_text(json.dumps(entry()))
    assert launch_for("forward", *HALF) == OURS
    file.unlink()
    assert launch_for("forward", *HALF) == OURS


def test_no_device_is_asked_without_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: pytest.fail("asked for the device"))
    monkeypatch.setattr("builtins.open", lambda *arguments: pytest.fail("opened a file"))
    for kernel in KERNELS:
        assert launch_for(kernel, *HALF) == shipped_launch(kernel, 64, "half")
        assert launch_for(kernel, 128, torch.float32, 64, 64) == shipped_launch(kernel, 128, "single")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "no JSON (Expecting property name"),
        ("[]", "the file is []; accepted: an object"),
        ({"8.9": 3}, "entry 8.9 is 3; accepted: an object"),
        ({"sm_89": {}}, "the file has 'sm_89'; accepted: a compute capability, as '8.9'"),
        ({"8.9": {"forwards": {}}}, "entry 8.9 has 'forwards'; accepted: states, forward, linear_backward"),
        ({"8.9": {"forward": {"72": {}}}}, "entry 8.9/forward has '72'; accepted: 64, 128, 256"),
        ({"8.9": {"forward": {"64": {"bfloat16": {}}}}}, "entry 8.9/forward/64 has 'bfloat16'; accepted: half, single"),
        ({"8.9": {"forward": {"64": {"half": [1]}}}}, "entry 8.9/forward/64/half is [1]; accepted: an object"),
        (
            entry(tile=3),
            "entry 8.9/forward/64/half: 'tile' is no field; accepted: tile_q, tile_k, chunk, warps, stages",
        ),
        (entry(chunk=None), "8.9/forward/64/half: chunk is missing; accepted: a power of two from 16 to 256"),
        (entry(tile_q=48), "8.9/forward/64/half: tile_q is 48; accepted: a power of two from 16 to 256"),
        (entry(tile_k=8), "tile_k is 8; accepted: a power of two from 16 to 256"),
        (entry(tile_k=512), "tile_k is 512; accepted: a power of two from 16 to 256"),
        (entry(chunk="64"), "chunk is '64'; accepted: a power of two from 16 to 256"),
        (entry(warps=32), "warps is 32; accepted: a power of two from 1 to 16"),
        (entry(warps=True), "warps is True; accepted: a power of two from 1 to 16"),
        (entry(warps=6), "warps is 6; accepted: a power of two from 1 to 16"),
        (entry(stages=9), "stages is 9; accepted: an integer from 1 to 8"),
        (entry(stages=0), "stages is 0; accepted: an integer from 1 to 8"),
        (entry(stages=2.0), "stages is 2.0; accepted: an integer from 1 to 8"),
    ],
)
def test_mistakes_in_the_file(content: Any, message: str, file: Path) -> None:
    """Named with the variable, the file, the entry, the value and what is accepted; the first call and every later."""
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    for _ in range(2):
        with pytest.raises(ValueError, match=VARIABLE) as raised:
            launches.from_environment()
        assert str(raised.value).startswith(f"{VARIABLE}: {file}: ")
        assert message in str(raised.value)


def test_files_that_cannot_be_read(file: Path) -> None:
    with pytest.raises(
        ValueError, match=r"launches.json: No such file or directory; accepted: a file that `tune` wrote"
    ):
        launches.from_environment()
    file.mkdir()
    with pytest.raises(ValueError, match=r"launches.json: Is a directory; accepted: "):
        launches.from_environment()
    file.rmdir()
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"launches.json: no JSON \('utf-8' codec"):
        launches.from_environment()


def test_every_limit_is_accepted(file: Path) -> None:
    least, most = Launch(16, 16, 16, 1, 1), Launch(256, 256, 256, 16, 8)
    for launch in (least, most):
        file.write_text(json.dumps(entry(**asdict(launch))))
        assert read(str(file)) == {"8.9": {("forward", 64, "half"): launch}}
    for kernel in KERNELS:
        for row in launches.ROWS:
            for precision in launches.PRECISIONS:
                assert not launches.mistakes(asdict(shipped_launch(kernel, row, precision)))


def test_a_mistake_is_raised_before_anything_is_launched(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    from sla_compile.kernels.triton import attention as triton_attention

    file.write_text("{")
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: pytest.fail("went on"))
    q = torch.zeros(1, 1, 64, 16)
    call, options = AttentionInputs(q, q, q, None, None), Case().attention_options
    with pytest.raises(ValueError, match=VARIABLE):
        triton_attention.forward(call, options)
    with pytest.raises(ValueError, match=VARIABLE):
        triton_attention.backward(q, call, ForwardResult(q, q, q, q), options)


def test_merging_keeps_what_is_there_for_others(tmp_path: Path) -> None:
    path = str(tmp_path / "launches.json")
    first, second, third = (replace(OURS, stages=n) for n in (1, 2, 3))
    key: Key = ("forward", 64, "half")
    other: Key = ("gate", 128, "single")
    merge(path, "8.9", {key: first, other: second})
    merge(path, "9.0", {key: second})
    merge(path, "8.9", {key: third})
    assert read(path) == {"8.9": {key: third, other: second}, "9.0": {key: second}}
    merge(path, "8.9", {key: None})
    assert read(path) == {"8.9": {other: second}, "9.0": {key: second}}
    assert [p.name for p in tmp_path.iterdir()] == ["launches.json"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "launches.json"
    merge(str(path), "8.9", {("forward", 64, "half"): OURS})
    before = path.read_text()

    def fails(*arguments: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="disk full"):
        merge(str(path), "8.9", {("forward", 64, "half"): None})
    assert path.read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["launches.json"]


def test_a_bad_file_is_not_written_over(tmp_path: Path) -> None:
    path = tmp_path / "launches.json"
    path.write_text('{"mine": 1}')
    with pytest.raises(ValueError, match="the file has 'mine'"):
        merge(str(path), "8.9", {("forward", 64, "half"): OURS})
    assert path.read_text() == '{"mine": 1}'


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_another_content_is_compiled_ahead_again(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(tokens=70, head_dim=16)
    job = job_of(case, inputs(case, torch.float32, "cpu"))
    keys = []
    for stages in (1, 2, 2):
        file.write_text(json.dumps(entry(stages=stages)))
        keys.append(ahead._key(job))
    monkeypatch.delenv(VARIABLE)
    keys.append(ahead._key(job))
    assert keys[1] == keys[2]
    assert len({*keys}) == 3


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(sys.platform != "linux", reason="Triton's assembler is for Linux")
@pytest.mark.parametrize(("capability", "warps"), [("9.0", 2), ("8.9", 8)])
def test_the_process_that_compiles_ahead_takes_the_same_launches(
    capability: str, warps: int, file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Those for the GPU that it answers for, a Hopper one."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    merge(str(file), capability, {("forward", 64, "single"): replace(OURS, warps=2, stages=1)})
    assert HOPPER.capability == (9, 0)
    case = Case(tokens=70, head_dim=16, weight="none", bias="none")
    thread = ahead.start(job_of(case, inputs(case, torch.float32, "cpu"), backward=False), tmp_path / "cache")
    assert thread is not None
    thread.join()
    (about,) = (tmp_path / "cache").glob("*/attention_forward_kernel.json")
    assert json.loads(about.read_text())["num_warps"] == warps
