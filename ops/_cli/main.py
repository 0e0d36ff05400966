"""The command ``jitops``, also ``python -m ops``."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ops

# The commands import torch, which takes seconds, and a minute from a cold disk: only once they can
# say so.


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status is 0 for success and 1 for an error, which is printed."""
    if sys.stdout is None:  # `jitops ... >&-`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # an arrow is no reason to fail
            stream.reconfigure(errors="replace")
    words = sys.argv[1:] if arguments is None else list(arguments)
    if words[:1] == ["demo"] and "torch" not in sys.modules:
        print("Importing torch, scikit-learn and matplotlib: slow the first time ...", flush=True)
    options = _parser().parse_args(words)
    try:
        with _warnings_in_a_line():
            status: int = options.run(options) or 0
        sys.stdout.flush()
    except ops.JitopsError as error:
        print(f"jitops: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # `jitops ... | head`: nobody reads on, so there is no more to say
        _give_up_stdout()
        return 1
    except OSError as error:  # say, `jitops ... > file` on a full disk
        print(f"jitops: {error}", file=sys.stderr)
        _give_up_stdout()
        return 1
    return status


@contextlib.contextmanager
def _warnings_in_a_line() -> Iterator[None]:
    """Ours: at which line of our code they were raised does not help who runs a command."""
    ours = (ops.BackendWarning, ops.CacheWarning, ops.ConfigWarning)
    with warnings.catch_warnings():
        show = warnings.showwarning

        def shown(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
            if issubclass(category, ours):
                print(f"jitops: {message}", file=sys.stderr)
            else:
                show(message, category, *where, **more)

        warnings.showwarning = shown
        yield


def _give_up_stdout() -> None:
    """Else Python would try again to write what is left when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    from ops._cli import _build, _bundle, _cache, _check, _doctor

    parser = argparse.ArgumentParser(
        prog="jitops", description="Custom losses and ops for PyTorch."
    )
    parser.add_argument("--version", action="version", version=f"jitops {ops.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="train on handwritten digits, compiled and pure torch in turn",
        description="Compile the improved triplet loss, train an embedding of scikit-learn's "
        "handwritten digits with it, compiled and pure torch in turn, and draw the result.",
    )
    demo.add_argument(
        "--steps", type=_build.positive, default=400, help="of training (default: 400)"
    )
    demo.add_argument(
        "--output",
        type=Path,
        default=Path("jitops_demo.png"),
        help="where to save the picture (default: ./jitops_demo.png)",
    )
    demo.set_defaults(run=_demo)

    explain = commands.add_parser("explain", help="say which back end runs each op, and why")
    explain.add_argument("ops", nargs="*", metavar="OP", help="ops to explain (default: all)")
    explain.set_defaults(run=lambda options: print(ops.explain(*options.ops)))

    for command in (_doctor, _build, _cache, _bundle, _check):
        command.add_to(commands)
    return parser


def _demo(options: argparse.Namespace) -> None:
    from ops._cli import _demo

    output = options.output.resolve()
    _demo.main(options.steps, output / "jitops_demo.png" if output.is_dir() else output)
