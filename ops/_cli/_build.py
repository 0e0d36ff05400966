"""``jitops build``: compile ops ahead of time, for container images, CI and login nodes."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from ops import _config
from ops._core import dispatch, extensions
from ops._errors import ArgumentError, JitopsError, ToolchainError
from ops.jit import Extension, _admin
from ops.jit._admin import Entry


def add_to(commands: Any) -> None:
    """Add the parser of the command."""
    parser = commands.add_parser(
        "build",
        help="compile ops ahead of time, in parallel",
        description="Compile ops into the cache, so that their first use need not.",
    )
    add_selection(parser)
    parser.add_argument("--jobs", type=positive, metavar="N", help="number of parallel compilers")
    parser.add_argument("--retry", action="store_true", help="retry extensions that failed")
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
            raise ArgumentError(f"OP must be among {', '.join(known)}, got {name!r}")
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
    told = os.environ.get("MAX_JOBS", "")
    jobs = options.jobs or (int(told) if told.isdecimal() else 0) or _admin.cpu.jobs()
    os.environ["MAX_JOBS"] = str(max(1, jobs // max(1, min(len(extensions), jobs))))
    entries, failed, started = [], [], time.perf_counter()
    with _bars(extensions) as show, ThreadPoolExecutor(jobs) as pool:
        running: dict[Future[Entry], Extension] = {
            pool.submit(_timed, show, extension): extension for extension in extensions
        }
        for future in as_completed(running):
            try:
                entries.append(future.result())
            except JitopsError as error:
                failed.append(str(error))
    for message in failed:
        print(f"jitops: {message}")
    print(
        f"{len(entries)} of {len(extensions)} built or in the cache, "
        f"{time.perf_counter() - started:.1f} s"
    )
    if editors:
        found = [
            command
            for entry in sorted(entries, key=lambda entry: entry.folder)
            for command in _admin.commands_of(entry)
        ]
        editors.write_text(json.dumps(found, indent=1) + "\n")
    return 1 if failed else 0


def _can_be_written(folder: Path) -> bool:
    return folder.is_dir() and os.access(folder, os.W_OK)


def _timed(show: Any, extension: Extension) -> Entry:
    show(extension.name, "building")
    try:
        entry = extension.build_entry()
    except BaseException:
        show(extension.name, "failed")
        raise
    show(extension.name, "done")
    return entry


class _bars:  # noqa: N801 - a context manager
    """A progress bar for each extension, on a terminal."""

    def __init__(self, extensions: list[Extension]) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            disable=not _config.settings().progress or not Console(stderr=True).is_terminal,
        )
        self._tasks = {
            one.name: self._progress.add_task(one.name, total=1, state="waiting", start=False)
            for one in extensions
        }

    def __enter__(self) -> Any:
        self._progress.start()
        return self._show

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def _show(self, name: str, state: str) -> None:
        task = self._tasks[name]
        if state == "building":
            self._progress.start_task(task)
        self._progress.update(task, state=state, completed=int(state == "done"))
        if state != "building":
            self._progress.stop_task(task)
