"""What is seen of a build: a live line on a terminal, one plain line in a log."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from ops import _config


def say(text: str) -> None:
    """One line on stderr, unless ``JITOPS_PROGRESS=0``."""
    if _config.settings().progress:
        _write(f"jitops: {text}\n")


def _write(text: str) -> None:
    # stderr may be closed, full, a broken pipe or no stream at all: a build does not fail of that.
    with contextlib.suppress(AttributeError, OSError, ValueError):
        sys.stderr.write(text)
        sys.stderr.flush()


def _is_terminal() -> bool:
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):
        return False


@contextlib.contextmanager
def watching(name: str, units: list[str], folder: Path) -> Iterator[None]:
    """While the body builds ``name`` in ``folder``: what compiles, which of how many, how long.

    Ninja notes each finished object in its log, which is all that is read.
    """
    started = time.perf_counter()
    done = threading.Event()
    live = _config.settings().progress and _is_terminal()

    def show() -> None:
        while not done.wait(0.1):
            finished = _finished(folder)
            left = [unit for unit in units if unit not in finished] or ["linking"]
            count = min(len(units), len(units) - len(left) + 1)
            seconds = time.perf_counter() - started
            _write(
                f"\r\x1b[Kjitops: {name}: compiling {', '.join(left)} "
                f"[{count}/{len(units)}] {seconds:.1f} s"
            )
        _write("\r\x1b[K")

    watcher = threading.Thread(target=show, name="jitops-progress", daemon=True)
    if live:
        watcher.start()
    try:
        yield
    finally:
        done.set()
        if live:
            watcher.join()
    files = f"{len(units)} file{'s' if len(units) > 1 else ''}"
    say(f"compiled {name} ({files}) in {time.perf_counter() - started:.1f} s")


def _finished(folder: Path) -> set[str]:
    """The sources whose objects are done, as ninja names them: x.o of x.cpp, x.cuda.o of x.cu."""
    try:
        lines = (folder / ".ninja_log").read_text().splitlines()
    except OSError:
        return set()
    objects = [line.split("\t")[3] for line in lines if line.count("\t") >= 4]
    names = {name.removesuffix(".cuda.o") + ".cu" for name in objects if name.endswith(".cuda.o")}
    return names | {name.removesuffix(".o") + ".cpp" for name in objects if name.endswith(".o")}
