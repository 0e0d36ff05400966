"""Ninja: found, run, and asked what it knows of a build."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from ops.jit._compile import _toolchain

_TO_END = 5.0  # seconds


class NinjaError(Exception):
    """A build failed. Of a kind that torch lets pass."""


def run(command: list[str], folder: str, environ: dict[str, str], echo: bool) -> str:
    """Run ninja to its end; its compilers end with it when this is interrupted.

    Args:
        command: its words.
        folder: where.
        environ: its environment variables.
        echo: whether to pass on to stdout what it says.

    Returns:
        What it said.

    Raises:
        NinjaError: it failed; its text is what it said.
    """
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # Ctrl-C reaches us alone, and we tell ninja
    )
    said = []
    try:
        for line in process.stdout or ():
            said.append(line)
            if echo:
                _echo(line.decode(errors="replace"))
        status = process.wait()
    except BaseException:
        process.terminate()  # it ends its compilers, each of which leads a group of its own
        try:
            process.wait(_TO_END)
        except subprocess.TimeoutExpired:
            process.kill()
        raise
    finally:
        process.wait()
        if process.stdout:
            process.stdout.close()
    output = b"".join(said).decode(errors="replace")
    if status:
        raise NinjaError(output or f"ninja ended with status {status} and said nothing")
    return output


def _echo(text: str) -> None:
    with contextlib.suppress(AttributeError, OSError, ValueError):  # as for _progress
        sys.stdout.write(text)
        sys.stdout.flush()


def see_all_headers(folder: Path, more: str) -> None:
    """Torch has g++ name the headers but for those found by ``-isystem`` and its kin: these too.

    The lists are left to be read by whoever asks: ninja would take them away.

    Args:
        more: a flag for the compiler.
    """
    script = folder / "build.ninja"
    lines = script.read_text().replace(" -MMD -MF ", f" {more} -MD -MF ").splitlines(keepends=True)
    theirs = ("depfile = $out.d", "deps = gcc")
    script.write_text("".join(line for line in lines if line.strip() not in theirs))


def commands(folder: Path) -> list[dict[str, Any]]:
    """What compiled each source, in the form of ``compile_commands.json``."""
    found = json.loads(_ask(folder, "compdb") or "[]")
    return [entry for entry in found if entry.get("output", "").endswith(".o")]


def _ask(folder: Path, tool: str) -> str:
    ninja = _toolchain.ninja_folder()
    command = [str(ninja / "ninja") if ninja else "ninja", "-t", tool]
    answer = subprocess.run(
        command, cwd=folder, env=_toolchain.environ(), capture_output=True, check=True
    )
    return os.fsdecode(answer.stdout)
