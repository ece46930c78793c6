"""Dynamo: the frame it compiles, the code it keeps, and how it names things."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import nn
from torch._C._dynamo.eval_frame import get_eval_frame_callback as frame_callback

from sla_compile.compat.forwards import RESUMED, modules_under_way, runs_forward_of
from sla_compile.compat.leftovers import forget_backend, let_go_of_guards, superseded_guards
from sla_compile.memory import is_our_backend
from sla_compile.user_warnings import warn_user

__all__ = [
    "Frame",
    "backend_function",
    "compiled_siblings",
    "current_frame",
    "forget_code",
    "frame_callback",
    "innermost_backend",
    "is_user_error",
    "plain_module_path",
    "runs_uncompiled",
    "skip_as_root_frame",
    "throw_away_compile",
    "traced_like",
    "user_errors",
]


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Let a ValueError raised under this reach the caller of the compiled model as the ValueError that it is.

    Dynamo turns a backend's exception into BackendCompilerFailed unless it is of one of its own kinds. Where it is set
    to suppress errors, this one is a warning. Remove when Dynamo has a public way for a backend to reject what the user
    asked.
    """
    import torch._dynamo.config as config
    from torch._dynamo.exc import ShortenTraceback

    class UserError(ValueError, ShortenTraceback):
        """A mistake of the user's, raised by the backend."""

        def __init__(self, message: str) -> None:
            ShortenTraceback.__init__(self, message, first_useful_frame=None)

    try:
        yield
    except ShortenTraceback:
        raise
    except ValueError as error:
        if config.suppress_errors:
            warn_user(f"torch._dynamo.config.suppress_errors lets this run as written, its attention dense: {error}")
        raise UserError(str(error)) from error


def is_user_error(error: Exception) -> bool:
    """Whether it is a ValueError that was raised under `user_errors`."""
    from torch._dynamo.exc import ShortenTraceback

    return isinstance(error, ValueError) and isinstance(error, ShortenTraceback)


def skip_as_root_frame(function: Callable[..., Any], *, with_callees: bool = False) -> None:
    """Never let Dynamo compile ``function`` as a frame of its own; inlining it into another frame still works.

    Without it, the hook of a module that is itself the root of a compile becomes a tiny graph. ``with_callees``: nor
    what it calls; within it, `frame_callback` then gives None. Remove when a public decorator can say "inline me, but
    do not start at me".
    """
    from torch._C._dynamo import eval_frame

    action = eval_frame._FrameAction
    strategy = eval_frame._FrameExecStrategy(action.SKIP, action.SKIP if with_callees else action.DEFAULT)
    eval_frame.set_code_exec_strategy(function.__code__, strategy)


@dataclass(frozen=True)
class Frame:
    """The Python frame that Dynamo is compiling while a backend runs, as the passes need it."""

    code: types.CodeType
    locals: dict[str, Any]
    compiler: Any
    _translator: Any

    def module(self, identity: int) -> nn.Module | None:
        """The live module behind an ``id`` in a node's ``nn_module_stack``."""
        variables = self._translator.output.side_effects.id_to_variable
        value = getattr(variables.get(identity), "value", None)
        return value if isinstance(value, nn.Module) and id(value) == identity else None

    @property
    def resumed(self) -> bool:
        """Whether the frame continues a function after a graph break."""
        return self.code.co_name.startswith(RESUMED)

    def root_module(self) -> nn.Module | None:
        """The module whose ``forward`` this frame is (or resumes), or that called this function with itself.

        The latter is how a processor of diffusers works, ``processor(attn, ...)``. None for any other function.
        """
        modules = [value for value in self.locals.values() if isinstance(value, nn.Module)]
        for module in modules:
            if runs_forward_of(self.code, module):
                return module
        around = next(modules_under_way(), None) if modules else None
        return next((module for module in modules if module is around), None)

    def modules_under_trace(self) -> list[nn.Module]:
        """The modules in whose forward Dynamo is now, outermost first."""
        root = self.root_module()
        identities = (str(key).partition("@")[0] for key in self._translator.output.current_tx.nn_module_stack)
        modules = [root, *(self.module(int(identity)) for identity in identities if identity.isdigit())]
        return [module for module in modules if module is not None]

    def sole_module(self) -> nn.Module | None:
        """The one module that a function works on, outside of every forward: ``def step(model, batch)``."""
        modules = {id(value): value for value in self.locals.values() if isinstance(value, nn.Module)}
        if len(modules) != 1 or next(modules_under_way(), None) is not None:
            return None
        return next(iter(modules.values()))

    def drop_superseded(self) -> None:
        """Invalidate compiled entries that would serve this frame as its modules are by now.

        A model of a known class that arrives without gates fails their guards only for that; what is compiled
        for it next would stand beside them in the cache, up to ``recompile_limit``. Remove when a backend can
        send a frame back to the cache.
        """
        forget_code(self.code, self.compiler, lambda guards: bool(guards.check(self.locals)))

    def join_buckets(self) -> bool:
        """Whether DDP's optimizer cut this frame's graph; if so it will not when the frame is analysed again.

        It cuts by the parameters' sizes, so that a gate's marker can be in one part and its attention in another.
        ``in_buckets`` then cuts what was rewritten. Remove when a backend can see the graph before it is cut.
        """
        optimizer = _ddp_optimizer(self.compiler)
        if optimizer is None or len(optimizer.buckets) < 2:
            return False
        optimizer.sla_caps = (optimizer.bucket_bytes_cap, optimizer.first_bucket_cap)
        optimizer.bucket_bytes_cap = optimizer.first_bucket_cap = sys.maxsize
        return True

    def in_buckets(self, compiler: Callable[..., Any]) -> Callable[..., Any]:
        """``compiler``, or one that cuts its graph as DDP's optimizer would have and compiles each part by it."""
        optimizer = _ddp_optimizer(self.compiler)
        caps = getattr(optimizer, "sla_caps", None)
        if optimizer is None or caps is None:
            return compiler
        cutting: Callable[..., Any] = type(optimizer)(caps[0], compiler, caps[1]).compile_fn
        return cutting

    def restart(self, reason: str) -> NoReturn:
        """Make Dynamo analyse this frame again from its start, with the modules as they now are.

        Remove when a backend can ask for that publicly; this exception is the one that passes through the
        backend call untouched on every supported version.
        """
        from torch._dynamo.exc import TensorifyScalarRestartAnalysis

        self._translator.speculation_log.clear()
        raise TensorifyScalarRestartAnalysis(restart_reason=reason)

    def leave_unguarded(self) -> None:
        """Let this compile serve any call: its code is run once, and its modules have changed since the trace.

        What guards would say about sizes is still worked out. Remove when a backend can say publicly that its graph
        serves this call alone.
        """
        output = self._translator.output
        guards = output.guards
        guards.inner = type(guards.inner)(guard for guard in guards.inner if guard.create_fn_name() == "SHAPE_ENV")
        output.skip_guards_check = True

    @staticmethod
    def restarts(error: Exception) -> bool:
        """Whether Dynamo analyses the frame again after ``error``, ours or its own, so that the compile goes on."""
        from torch._dynamo.exc import RestartAnalysis

        return isinstance(error, RestartAnalysis)


def current_frame() -> Frame | None:
    """The frame under compilation; None where the backend is called outside Dynamo."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        translator: Any = InstructionTranslator.current_tx()
    except AttributeError:  # no translator is set on this thread; torch 2.11 returns None then
        translator = None
    if translator is None:
        return None
    while getattr(translator, "parent", None) is not None:
        translator = translator.parent
    # In the words of the annotations, ``code`` and ``locals`` are those of the frame itself, not of an inlined call.
    return Frame(translator.f_code, dict(translator.f_locals), translator.output.compiler_fn, translator)


def traced_like(tensor: torch.Tensor, value: Any) -> torch.Tensor:
    """``tensor`` as a value of the trace that ``value`` is of; as it is where that is of none.

    Remove when a backend can say what a tensor that it adds to a graph is in the trace.
    """
    mode = getattr(value, "fake_mode", None)
    return tensor if mode is None else mode.from_tensor(tensor, static_shapes=True)


def runs_uncompiled() -> bool:
    """Whether this is Python code that runs as it is written in what is compiled by a backend of ours.

    Dynamo has then given up a frame of it, such as any under a transform of ``torch.func``, for that call and, without
    this, for all to come. Remove when Dynamo has a public way to learn of it.
    """
    from torch._C._dynamo import eval_frame

    callback: Any = frame_callback()
    if not callable(callback) or not is_our_backend(backend_function(callback)):
        return False
    default = eval_frame._FrameExecStrategy(eval_frame._FrameAction.DEFAULT, eval_frame._FrameAction.DEFAULT)
    frame: types.FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_name != "compile_wrapper":
        eval_frame.set_code_exec_strategy(frame.f_code, default)
        frame = frame.f_back
    return True


def backend_function(compiler: Any) -> Any:
    """The backend within what ``torch.compile``, DDP's optimizer and Dynamo make of it."""
    inner = innermost_backend(compiler)
    if (optimizer := _ddp_optimizer(inner)) is not None:
        inner = innermost_backend(optimizer.backend_compile_fn)
    return getattr(inner, "compiler_fn", inner)


def _ddp_optimizer(compiler: Any) -> Any:
    """The DDPOptimizer of torch that stands between Dynamo and the backend; None where there is none."""
    owner = getattr(innermost_backend(compiler), "__self__", None)
    return owner if type(owner).__name__ == "DDPOptimizer" else None


def innermost_backend(compiler: Any) -> Any:
    """The function that the user's compile ends at, below what Dynamo wraps around it."""
    from torch._dynamo import eval_frame

    return eval_frame.innermost_backend(compiler)


def compiled_siblings(module: nn.Module, compiler: Any) -> list[nn.Module]:
    """Other live modules of ``type(module)`` that were compiled by themselves with an equal ``compiler``.

    Both ``block.compile(...)`` and ``torch.compile(block, ...)`` count. They share one code cache with
    ``module``. Remove when Dynamo lists the modules of a compiled code object.
    """
    import gc

    from torch._dynamo.eval_frame import OptimizedModule

    def compiled_with(context: Any) -> bool:
        callback = getattr(context, "callback", None)
        return callback is not None and bool(innermost_backend(callback) == innermost_backend(compiler))

    found: dict[int, nn.Module] = {}
    for candidate in gc.get_referrers(type(module), OptimizedModule):  # an object refers to its class
        kind = type(candidate)
        if kind is type(module):
            compiled = candidate.__dict__.get("_compiled_call_impl")
            if compiled is not None and compiled_with(_closure(compiled).get("self")):
                found[id(candidate)] = candidate
        elif kind is OptimizedModule:
            inner = candidate.__dict__["_modules"].get("_orig_mod")
            if type(inner) is type(module) and compiled_with(candidate.__dict__.get("dynamo_ctx")):
                found[id(inner)] = inner
    found.pop(id(module), None)
    return list(found.values())


def _closure(function: Any) -> dict[str, Any]:
    code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None)
    if code is None or cells is None:
        return {}
    return {name: cell.cell_contents for name, cell in zip(code.co_freevars, cells, strict=True)}


def forget_code(code: types.CodeType, compiler: Any = None, stale: Callable[[Any], bool] = lambda _: True) -> None:
    """Let nothing that Dynamo compiled for ``code`` (by ``compiler``, with guards that are ``stale``) serve again.

    It does not guard on module hooks. Not ``reset_code``: a compile of ``code`` that is under way holds its entries.
    """
    from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list

    dropped = []
    for entry in _debug_get_cache_entry_list(code):
        guards: Any = entry.guard_manager
        if guards.extra_state is None or (compiler and innermost_backend(entry.backend) != innermost_backend(compiler)):
            continue
        if stale(guards):
            guards.extra_state.invalidate(guards.cache_entry, superseded_guards())
            dropped.append(guards)
    let_go_of_guards(dropped)


@contextlib.contextmanager
def throw_away_compile() -> Iterator[list[Frame]]:
    """Compile under this and leave no trace; append each frame that was compiled to the list it yields.

    What is compiled shares its code, and so Dynamo's cache and its limit, with the user's own compiles. Remove when
    torch 2.11 does: ``torch.compile(isolate_recompiles=True)`` is the public form, from 2.13 on.
    """
    import torch._dynamo.config as config

    frames: list[Frame] = []
    limits: dict[str, Any] = {"recompile_limit": 2**20, "accumulated_recompile_limit": 2**20}
    with _compiling_turned_on(), config.patch(limits):
        try:
            yield frames
        finally:
            for frame in frames:
                forget_code(frame.code, frame.compiler)
                forget_backend(innermost_backend(frame.compiler))
            frames.clear()


@contextlib.contextmanager
def _compiling_turned_on() -> Iterator[None]:
    """Compile although the user has turned that off by environment or stance; errors are not suppressed.

    Remove when ``torch.compile`` can be told to compile in any case.
    """
    import torch._dynamo.config as config

    off = os.environ.pop("TORCHDYNAMO_DISABLE", None)
    on: dict[str, Any] = {"disable": False, "suppress_errors": False}  # TORCH_COMPILE_DISABLE is read into the first
    try:
        with torch.compiler.set_stance("default"), config.patch(on):
            yield
    finally:
        if off is not None:
            os.environ["TORCHDYNAMO_DISABLE"] = off


_MODULES_ENTRY = re.compile(r"\.__dict__\['_modules'\]\['([^']+)'\]|\._modules\['([^']+)'\]")


def plain_module_path(source: str) -> str:
    """``L['self'].__dict__['_modules']['blocks'].0.attn1`` as ``blocks.0.attn1``."""
    path = _MODULES_ENTRY.sub(lambda match: "." + (match.group(1) or match.group(2)), source)
    return re.sub(r"^[LG]\['[^']+'\]\.?", "", path)
