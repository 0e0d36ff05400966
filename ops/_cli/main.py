"""The command ``jitops``, also run by ``python -m ops``."""

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
from ops import _namesake

# The commands import torch, which takes seconds, or a minute from a cold disk. They are therefore
# imported late, after main() has announced it.


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0 for success, 1 for an error."""
    if sys.stdout is None:  # `jitops ... >&-`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a locale may lack characters such as an arrow
            stream.reconfigure(errors="replace")
    replaced = _namesake.replaced()
    if replaced:
        print(f"jitops: {replaced}", file=sys.stderr)
        return 1
    words = sys.argv[1:] if arguments is None else list(arguments)
    if words[:1] == ["demo"] and "torch" not in sys.modules:
        print("Importing torch, scikit-learn and matplotlib, slow the first time ...", flush=True)
    options = _parser().parse_args(words)
    try:
        with _warnings_in_a_line():
            status: int = options.run(options) or 0
        sys.stdout.flush()
    except ops.JitopsError as error:
        print(f"jitops: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # as in `jitops ... | head`
        _give_up_stdout()
        return 1
    except OSError as error:  # as in `jitops ... > file` on a full disk
        print(f"jitops: {error}", file=sys.stderr)
        _give_up_stdout()
        return 1
    return status


@contextlib.contextmanager
def _warnings_in_a_line() -> Iterator[None]:
    """Print our warnings without their line of code, which does not help users of a command."""
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
    """Send stdout nowhere. Otherwise Python would retry the remaining output when it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    from ops._cli import _build, _bundle, _cache, _check, _doctor, _new

    parser = argparse.ArgumentParser(
        prog="jitops", description="Custom losses and ops for PyTorch."
    )
    parser.add_argument("--version", action="version", version=f"jitops {ops.__version__}")
    commands = _build.add_actions(parser, "commands", "COMMAND")

    demo = commands.add_parser(
        "demo",
        help="train on handwritten digits, compiled and on pure torch",
        description="Compile the improved triplet loss. Train an embedding of scikit-learn's "
        "handwritten digits with it, compiled and on pure torch. Draw the result.",
    )
    demo.add_argument(
        "--steps", type=_build.positive, default=400, help="training steps (default: 400)"
    )
    demo.add_argument(
        "--output",
        type=Path,
        default=Path("jitops_demo.png"),
        help="file or folder of the picture (default: ./jitops_demo.png)",
    )
    demo.set_defaults(run=_demo)

    explain = commands.add_parser(
        "explain",
        help="say which back end runs each op, and why",
        description="Say which back end runs each op, and why.",
    )
    explain.add_argument("ops", nargs="*", metavar="OP", help="ops to explain (default: all)")
    explain.set_defaults(run=lambda options: print(ops.explain(*options.ops)))

    for command in (_doctor, _build, _cache, _bundle, _check, _new):
        command.add_to(commands)
    return parser


def _demo(options: argparse.Namespace) -> None:
    from ops._cli import _demo

    output = options.output.resolve()
    _demo.main(options.steps, output / "jitops_demo.png" if output.is_dir() else output)
