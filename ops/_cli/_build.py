"""``jitops build``: compile ops ahead of time, for container images, CI and login nodes."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from ops._core import dispatch, extensions
from ops._errors import ArgumentError, JitopsError, ToolchainError, did_you_mean
from ops.jit import Extension, _admin


def add_to(commands: Any) -> None:
    """Add the parser of the command."""
    parser = commands.add_parser(
        "build",
        help="compile ops ahead of time, in parallel",
        description="Compile ops into the cache, so that their first use need not.",
    )
    add_selection(parser)
    parser.add_argument("--jobs", type=positive, metavar="N", help="number of parallel compilers")
    parser.add_argument(
        "--retry", action="store_true", help="of no effect: failed builds are always tried again"
    )
    parser.add_argument(
        "--compile-commands",
        type=Path,
        metavar="FILE",
        help="write a compile_commands.json for clangd and editors to FILE",
    )
    parser.set_defaults(run=main)


def add_selection(parser: argparse.ArgumentParser) -> None:
    """Add the options that select extensions, which several commands share."""
    parser.add_argument("ops", nargs="*", metavar="OP", help="default: all compiled ops")
    parser.add_argument(
        "--backend",
        choices=("cpp", "cuda"),
        action="append",
        help="default: each that can be built here",
    )
    parser.add_argument(
        "--arch",
        metavar="LIST",
        help="GPU architectures, as in '8.0 9.0+PTX' (default: those of this machine)",
    )
    parser.add_argument(
        "--cpu",
        action="append",
        choices=extensions.LEVELS,
        help="instruction set to compile for; repeat it for several (default: that of this CPU)",
    )


def add_actions(parser: argparse.ArgumentParser, title: str, metavar: str) -> Any:
    """Let a command have actions; without one, it prints its help and fails."""

    def print_help(_: argparse.Namespace) -> int:
        parser.print_help()
        return 2

    parser.set_defaults(run=print_help)
    return parser.add_subparsers(title=title, metavar=metavar)


def positive(text: str) -> int:
    """Parse a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def selected(options: argparse.Namespace) -> list[Extension]:
    """The extensions that the options select.

    Raises:
        ArgumentError: the op does not exist, or lacks the back end.
        ToolchainError: ``--backend=cuda`` or ``--arch`` is given, but CUDA cannot be built here.
    """
    if options.arch:
        os.environ["TORCH_CUDA_ARCH_LIST"] = options.arch
    known = dispatch.known()
    for name in options.ops:
        if name not in known:
            meant = did_you_mean(name, known)
            raise ArgumentError(f"OP must be among {', '.join(known)}, got {name!r}{meant}")
    backends = options.backend or ["cpp", "cuda"]
    if "cuda" in backends:
        try:
            _admin.compilers.check_cuda()
            _admin.gpu_archs.architectures()
        except ToolchainError as error:
            if options.backend or options.arch:
                raise
            print(f"jitops: skipping CUDA: {error}", file=sys.stderr)
            backends = ["cpp"]
    return [
        extensions.extension(name, backend, level)
        for name in options.ops or known
        for backend in backends
        for level in options.cpu or [None]
    ]


def main(options: argparse.Namespace) -> int:
    """Build the selected extensions; the exit status is 1 if one failed."""
    editors = options.compile_commands
    if editors and (editors.is_dir() or not _can_be_written(editors.parent)):
        raise ArgumentError(
            f"--compile-commands must be a file in a writable folder, got {editors}"
        )
    extensions = selected(options)
    jobs = options.jobs or _admin.cpu.jobs()
    os.environ["MAX_JOBS"] = str(max(1, jobs // max(1, min(len(extensions), jobs))))
    entries, started = [], time.perf_counter()
    with ThreadPoolExecutor(jobs) as pool:
        for future in as_completed([pool.submit(one.build_entry) for one in extensions]):
            try:
                entries.append(future.result())
            except JitopsError as error:
                print(f"jitops: {error}", flush=True)
    print(
        f"{len(entries)} of {len(extensions)} built or in the cache, "
        f"{time.perf_counter() - started:.1f} s"
    )
    if editors:
        found = [
            command
            for entry in sorted(entries, key=lambda entry: entry.folder)
            for command in _commands_of(entry)
        ]
        editors.write_text(json.dumps(found, indent=1) + "\n")
    return int(len(entries) < len(extensions))


def _commands_of(entry: _admin.entries.Entry) -> list[dict[str, str]]:
    ninja = _admin.compilers.ninja()
    if ninja is None:
        raise ToolchainError(_admin.compilers.NO_NINJA)
    ask = [str(ninja), "-C", str(entry.folder), "-t", "compdb"]
    told = subprocess.run(ask, stdout=subprocess.PIPE, check=True).stdout
    return [one for one in json.loads(told) if os.path.isabs(one["file"])]


def _can_be_written(folder: Path) -> bool:
    return folder.is_dir() and os.access(folder, os.W_OK)
