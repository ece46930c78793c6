"""Command line: ``python -m sla_compile explain package.module:factory``; ``atlas``, ``bench``,
``compare``, ``doctor``, ``show`` and ``tune``.

In this order: the parser, the commands with what they print. A command imports what it needs when it runs.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import inspect
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from sla_compile.common.limits import BLOCK_SIZES, LINEAR_BRANCHES, MAX_HEAD_DIM, MIN_HEAD_DIM
from sla_compile.factories import UsageError, call_factory, error_line, key_values, model_and_inputs

if TYPE_CHECKING:
    from torch import nn

    from sla_compile.checkpoints.gate_format import SavedGate
    from sla_compile.config import SLAConfig
    from sla_compile.kernels.triton.tuning import Outcome

__all__ = ["main"]

_EXPLAIN = """\
explain what backend="sla" would do to each attention of a model; nothing is compiled or changed.

FACTORY is package.module:name of something callable (dots after the colon reach into classes). It returns
  a tuple (model, args) or (model, args, kwargs), for the call model(*args, **kwargs) that is traced, or
  a model with an attribute example_inputs: a tuple of args, or a dict of kwargs.
"""

_ATLAS = """\
run a model once, dense, and show where its attention goes: true attention in critical, marginal and negligible blocks,
errors, the error against topk, and the topks that allocate would choose. Nothing is compiled or changed.

FACTORY is as for explain.
"""

_COMPARE = """\
compare a model with what it would be with sparse-linear attention: error of each attention and of the output, time and
memory of a forward. Nothing in the model changes; copies of it are compiled.

FACTORY is as for explain.
"""

_BENCH = (
    "time one attention on this machine, dense and SLA, forward and with its backward; its numbers are checked first"
)

_TUNE = """\
time launches of the Triton kernels on this GPU, for each head dimension and dtype.

Those that are faster than the shipped ones are written to FILE, beside what it has for other GPUs. They are in force
  where SLA_COMPILE_LAUNCHES=FILE is set.
"""


class _Parser(argparse.ArgumentParser):
    """Raises UsageError where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, or 2 with one line on stderr."""
    try:
        options = _parser().parse_args(arguments)
        text: str = options.run(options)
    except UsageError as error:
        line = " ".join(str(error).split())
        print(f"sla_compile: error: {line}", file=sys.stderr)
        return 2
    if text:  # a command that has printed returns none
        print(text)
    return 0


def _parser() -> _Parser:
    parser = _Parser(prog="python -m sla_compile", description="sla-compile on the command line.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    explain = commands.add_parser(
        "explain",
        help="what would become of each attention of a model",
        description=_EXPLAIN,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    explain.add_argument("--no-diff", action="store_true", help="leave out the graph around each site")
    explain.set_defaults(run=_explain)
    show = commands.add_parser("show", help="the gates in a file that sla_compile.save wrote")
    show.add_argument("file", metavar="FILE")
    show.set_defaults(run=_show)
    tune, bench = _add_tune(commands), _add_bench(commands)
    atlas = commands.add_parser(
        "atlas",
        help="where the attention of a model goes, and which topk each site needs",
        description=_ATLAS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    atlas.add_argument("--site", metavar="PATH", help="the maps of the attention of this module")
    atlas.add_argument("--out", nargs="+", default=[], metavar="FILE", help=".html, .png, .svg, .pdf or .json")
    atlas.set_defaults(run=_atlas)
    compare = commands.add_parser(
        "compare",
        help="error, time and memory of a model, dense against SLA",
        description=_COMPARE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    compare.add_argument("--inner", default="inductor", help='what both are timed with; "none": nothing is timed')
    compare.add_argument("--out", nargs="+", default=[], metavar="FILE", help=".png, .svg, .pdf or .json")
    compare.set_defaults(run=_compare)
    for command in (explain, atlas, compare):
        _add_factory(command)
    doctor = commands.add_parser("doctor", help="what a report of a bug should hold: this machine, and a self-test")
    doctor.add_argument("--no-self-test", action="store_true", help="leave out the seconds of computing")
    doctor.set_defaults(run=_doctor)
    for command in (explain, atlas, bench, compare):
        command.add_argument(
            "--config",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            help="a field of SLAConfig, its value as JSON (or text); repeatable",
        )
    for command in (explain, show, doctor, atlas, bench, compare):
        command.add_argument("--json", action="store_true", help="print JSON")
    for command in (explain, show, tune, doctor, atlas, bench, compare):
        command.add_argument("--width", type=_integer(20), default=None, help="columns, at least 20")
    return parser


def _add_tune(commands: Any) -> _Parser:
    """The parser of ``tune``, added to those of ``commands``."""
    tune: _Parser = commands.add_parser(
        "tune",
        help="choose launches of the Triton kernels for this GPU",
        description=_TUNE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    tune.add_argument("file", metavar="FILE")
    tune.add_argument(
        "--head-dim", nargs="+", type=_integer(MIN_HEAD_DIM, MAX_HEAD_DIM), default=[64, 128], help="of each, 16 to 256"
    )
    tune.add_argument("--dtype", nargs="+", choices=_DTYPES, default=["bfloat16", "float32"])
    tune.add_argument("--tokens", type=_integer(1), default=16384, help="of the attention that is timed")
    tune.add_argument("--heads", type=_integer(1), default=12)
    tune.add_argument("--blocks", type=int, choices=BLOCK_SIZES, default=64, help="block_q and block_k")
    tune.set_defaults(run=_tune)
    return tune


def _add_bench(commands: Any) -> _Parser:
    """The same of ``bench``."""
    bench: _Parser = commands.add_parser(
        "bench", help="one attention on this machine: dense against SLA", description=_BENCH
    )
    bench.add_argument("--shape", nargs=4, type=_integer(1), metavar=("B", "H", "N", "D"), help="by default a video's")
    bench.add_argument(
        "--linear", nargs="+", choices=LINEAR_BRANCHES, help="forms to time, by default that of the settings"
    )
    bench.add_argument("--dtype", choices=_DTYPES, help="by default bfloat16 on a GPU, float32 on a CPU")
    bench.add_argument("--device", choices=("cpu", "cuda"), help="by default the GPU if there is one")
    bench.add_argument("--seconds", type=float, default=1.0, help="of timing for each arm and direction")
    bench.add_argument("--out", nargs="+", default=[], metavar="FILE", help=".png, .svg, .pdf or .json")
    bench.set_defaults(run=_bench)
    return bench


def _add_factory(command: argparse.ArgumentParser) -> None:
    command.add_argument("factory", metavar="FACTORY", help="package.module:factory")
    command.add_argument(
        "--args",
        nargs="*",
        default=[],
        metavar="ARG",
        help="arguments of the factory, VALUE or NAME=VALUE; a VALUE is JSON, or else text",
    )


_DTYPES = ("bfloat16", "float16", "float32")


def _integer(least: int, most: int | None = None) -> Callable[[str], int]:
    """A ``type`` for argparse: reads an integer from ``least`` to ``most``."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least or (most is not None and int(text) > most):
            accepted = f"of at least {least}" if most is None else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"got {text!r}; accepted: an integer {accepted}")
        return int(text)

    return read


def _explain(options: argparse.Namespace) -> str:
    from sla_compile.reporting.model_report import explain

    config = _config(options.config)
    model, args, kwargs = model_and_inputs(options.factory, call_factory(options.factory, options.args))
    try:
        report = explain(model, args, kwargs, config=config)
    except Exception as error:
        raise UsageError(f"{options.factory}: cannot be traced: {error_line(error)}") from error
    report = report.without_diffs() if options.no_diff else report
    return report.to_json() if options.json else _print(report, options.width)


def _config(given: Sequence[str]) -> SLAConfig | None:
    from sla_compile.config import SLAConfig

    try:
        return SLAConfig.from_options(key_values("--config", given)) if given else None
    except ValueError as error:
        raise UsageError(f"--config: {error}") from error


def _check_endings(paths: Sequence[str], *kinds: str) -> None:
    """Raise ValueError, before anything is run, for a file of which it is not known what to write there."""
    from sla_compile.inspection.figures import checked_kind

    for path in paths:
        checked_kind(path, ("figure", *kinds))


def _model_and_batches(options: argparse.Namespace) -> tuple[nn.Module, list[Any]]:
    """What the factory returned, its arguments as one batch."""
    model, args, kwargs = model_and_inputs(options.factory, call_factory(options.factory, options.args))
    named = inspect.signature(model.forward).bind_partial(*args).arguments if args and kwargs else {}
    return model, [{**named, **kwargs} if kwargs else args]


def _atlas(options: argparse.Namespace) -> str:
    from sla_compile.inspection.atlas import atlas

    config = _config(options.config)
    try:
        _check_endings(options.out, "html", "json")
        found = atlas(*_model_and_batches(options), config)
        view = found if options.site is None else found.site(options.site)
        for path in options.out:
            found.save(path, options.site)
    except Exception as error:
        raise _usage_error(options.factory, error) from error
    return found.to_json(indent=2, maps=options.site is not None) if options.json else _print(view, options.width)


def _compare(options: argparse.Namespace) -> str:
    from sla_compile.inspection.comparison import compare

    config, inner = _config(options.config), None if options.inner == "none" else options.inner
    try:
        _check_endings(options.out, "json")
        report = compare(*_model_and_batches(options), config, inner=inner)
        for path in options.out:
            report.save(path)
    except Exception as error:
        raise _usage_error(options.factory, error) from error
    return report.to_json() if options.json else _print(report, options.width)


def _usage_error(what: str, error: Exception) -> UsageError:
    return error if isinstance(error, UsageError) else UsageError(f"{what}: {error_line(error)}")


def _bench(options: argparse.Namespace) -> str:
    import torch

    from sla_compile.inspection.benchmark import bench

    config = _config(options.config)
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("bench: no GPU is available to torch")
    try:
        _check_endings(options.out, "json")
        report = bench(
            options.shape,
            linear=options.linear,
            config=config,
            dtype=dtype,
            device=options.device,
            seconds=options.seconds,
        )
        for path in options.out:
            report.save(path)
    except Exception as error:
        raise _usage_error("bench", error) from error
    return report.to_json() if options.json else _print(report, options.width)


def _doctor(options: argparse.Namespace) -> str:
    from sla_compile.inspection.doctor import doctor

    report = doctor(self_test=not options.no_self_test)
    return report.to_json() if options.json else _print(report, options.width)


def _show(options: argparse.Namespace) -> str:
    from sla_compile.checkpoints.gate_format import read_gate_file
    from sla_compile.reporting.terminal import GatesView

    try:
        file = read_gate_file(options.file)
    except (OSError, ValueError) as error:
        raise UsageError(str(error).removeprefix("load: ")) from error
    if file.problems:
        raise UsageError(f"{options.file}: {'; '.join(file.problems)}")
    gates = [_gate_summary(saved) for saved in file.gates.values()]
    if options.json:
        return json.dumps({"config": file.config.to_dict(), "gates": gates}, indent=2)
    return _print(GatesView(options.file, gates), options.width)


def _gate_summary(saved: SavedGate) -> dict[str, Any]:
    """One gate of a file as ``show`` prints it: JSON types alone."""
    spec, tensors = saved.spec, saved.tensors
    summary = {
        "path": spec.path,
        "heads": spec.heads,
        "head_dim": spec.head_dim,
        "shape": list(next(iter(tensors.values())).shape),
        "dtype": str(saved.dtype).removeprefix("torch."),
        **{f"{name}_norm": tensors[name].double().norm().item() for name in ("weight", "bias") if name in tensors},
        "config": saved.settings(),
    }
    if "shift" in tensors:
        summary["shift"] = tensors["shift"].double().tolist()
    if spec.config.sparse_scale:
        summary["scale"] = tensors["log_scale"].double().exp().tolist()
    return summary


def _tune(options: argparse.Namespace) -> str:
    import torch

    from sla_compile.kernels.triton.launches import merge

    if importlib.util.find_spec("triton") is None:
        raise UsageError("tune: triton is not installed")
    if not torch.cuda.is_available():
        raise UsageError("tune: no GPU is available to torch; the Triton kernels run on nothing else")
    from sla_compile.kernels.triton.tuning import Workload, on_gpu, tune

    sizes = (options.tokens, options.heads, options.blocks)
    workloads = [Workload(dim, getattr(torch, name), *sizes) for dim in options.head_dim for name in options.dtype]
    if len({workload.key("") for workload in workloads}) < len(workloads):
        raise UsageError(
            "tune: two of these share their launches: dtypes of 16 bits, or head dimensions to 64, 128 or 256"
        )
    capability = "{}.{}".format(*torch.cuda.get_device_capability())
    found: list[Outcome] = []
    try:
        merge(options.file, capability, {})  # fails now, not after minutes, if the file cannot be written
        for workload in workloads:
            with _status_line() as show, on_gpu(workload) as trials:
                outcomes = tune(workload, trials, progress=show)
            merge(options.file, capability, {x.key: x.best if x.best != x.shipped else None for x in outcomes})
            found += outcomes
    except (OSError, ValueError, RuntimeError) as error:
        raise UsageError(f"tune: {error}") from error
    from sla_compile.inspection.terminal import tuning_table

    return _print(tuning_table(found, options.file, torch.cuda.get_device_name()), options.width)


@contextlib.contextmanager
def _status_line() -> Iterator[Callable[[str], None]]:
    """Within this context, a line on stderr, if that is a terminal, shows the text that the function is called with."""
    from rich.console import Console

    with Console(stderr=True).status("") as status:
        yield status.update


def _print(view: Any, width: int | None) -> str:
    """Print ``view`` to standard output, in colour on a terminal; returns "", so that `main` prints nothing more."""
    from rich.console import Console

    Console(width=width).print(view)
    return ""


if __name__ == "__main__":
    sys.exit(main())
