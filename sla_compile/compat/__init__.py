"""Every use of a private PyTorch API, and every difference between torch 2.11 and 2.15, in one place.

Each entry says what public thing it waits for. ``tests/test_compat.py`` enters each one on the installed torch.
"""

from __future__ import annotations

from sla_compile.compat.diffusers import is_attention_dispatch, trace_ulysses
from sla_compile.compat.dynamo import (
    Frame,
    backend_function,
    compiled_siblings,
    current_frame,
    forget_code,
    frame_callback,
    is_user_error,
    plain_module_path,
    runs_uncompiled,
    skip_as_root_frame,
    throw_away_compile,
    traced_like,
    user_errors,
)
from sla_compile.compat.forwards import (
    forward_codes,
    forward_functions,
    model_under_way,
    modules_under_way,
    plain_function_name,
    runs_forward_of,
)
from sla_compile.compat.inductor import lower_gather, mixed_reductions, sound_options, triton_cache_folder
from sla_compile.compat.recompile_limits import count_apart, on_recompile_limit
from sla_compile.compat.runtime import (
    count_in_running_counters,
    data_parallel,
    flattened,
    fully_sharded,
    has_tangent,
    no_compile_under,
    running_transform,
    trace_artifact,
)
from sla_compile.compat.shapes import always_holds, size_hint

__all__ = [
    "Frame",
    "always_holds",
    "backend_function",
    "compiled_siblings",
    "count_apart",
    "count_in_running_counters",
    "current_frame",
    "data_parallel",
    "flattened",
    "forget_code",
    "forward_codes",
    "forward_functions",
    "frame_callback",
    "fully_sharded",
    "has_tangent",
    "is_attention_dispatch",
    "is_user_error",
    "lower_gather",
    "mixed_reductions",
    "model_under_way",
    "modules_under_way",
    "no_compile_under",
    "on_recompile_limit",
    "plain_function_name",
    "plain_module_path",
    "running_transform",
    "runs_forward_of",
    "runs_uncompiled",
    "size_hint",
    "skip_as_root_frame",
    "sound_options",
    "throw_away_compile",
    "trace_artifact",
    "trace_ulysses",
    "traced_like",
    "triton_cache_folder",
    "user_errors",
]
