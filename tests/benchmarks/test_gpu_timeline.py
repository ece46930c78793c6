"""What a profiler's trace adds up to."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from benchmarks.gpu_timeline import Timeline, profile, timeline

SEND = "ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)"
SUM = "ncclDevKernel_AllReduce_Sum_bf16_RING_LL"


def test_kernels_add_up(tmp_path: Path) -> None:
    spans = [
        *(("gemm", "kernel", 0, 1000), (SEND, "kernel", 500, 1000), ("Memset", "gpu_memset", 1400, 200)),
        *((SUM, "kernel", 2000, 400), (SEND, "kernel", 2200, 600), ("gemm", "kernel", 2300, 100)),
        *(("nccl:all_to_all", "gpu_user_annotation", 0, 9000), ("cudaLaunchKernel", "cuda_runtime", 0, 9000)),
    ]
    events = [{"name": name, "cat": kind, "ts": begin, "dur": length} for name, kind, begin, length in spans]
    path = tmp_path / "trace.json.gz"
    with gzip.open(path, "wt") as file:
        json.dump({"traceEvents": [*events, {"name": "process_name", "ph": "M"}]}, file)
    found = timeline(path, longest=2)
    assert found is not None
    longest = {SEND: 1.6, "gemm": 1.1}
    expected = Timeline(
        span=2.8, compute=1.3, nccl=1.8, exposed=1.1, idle=0.4, exchanges=2, exchange=1.6, longest=longest
    )
    assert vars(found) == {name: pytest.approx(value) for name, value in vars(expected).items()}


def test_a_trace_without_a_gpu(tmp_path: Path) -> None:
    path = tmp_path / "of_nothing" / "trace.json.gz"
    profile(lambda: None, path)
    assert path.exists()
    assert timeline(path) is None
