"""What a build sees: an environment of its own, and the programs in it."""

from __future__ import annotations

import os
import shlex
import shutil
from pathlib import Path

from ops._errors import ToolchainError
from ops.jit._compile import _hardware, _toolchain


# torch puts a ccache or sccache that is on PATH before the compiler, unasked. ccache's direct mode
# returns the old object when a new header hides another one, and a user's own $CXX may name ccache.
_WITHOUT_STALE_OBJECTS = {"TORCH_NO_COMPILER_WRAPPER": "1", "CCACHE_NODIRECT": "1"}


def ninja_path() -> str:
    """Where ninja is.

    Raises:
        ToolchainError: nowhere.
    """
    folder = _toolchain.ninja_folder()
    if folder is None:
        raise ToolchainError(_toolchain.NO_NINJA)
    return str(folder / "ninja")


def environ(folder: Path) -> dict[str, str]:
    """Ours, and what torch and ninja are to find in it; the build is in ``folder``.

    Raises:
        ToolchainError: there is no compiler.
    """
    compiler = _toolchain.cxx()
    if compiler is None:
        raise ToolchainError(_toolchain.NO_COMPILER)
    found = _toolchain.environ()
    found.pop("NINJA_STATUS", None)  # how a terminal wants its progress is no matter of ours
    found.pop("TORCH_EXTENSION_SKIP_NVCC_GEN_DEPENDENCIES", None)  # we would learn of no header
    if "LC_ALL" in found:  # it would have the last word on messages
        found["LC_CTYPE"] = found.pop("LC_ALL")
    return {
        **found,
        "MAX_JOBS": os.environ.get("MAX_JOBS") or str(_hardware.jobs()),
        "CXX": str(_as_one_word(compiler, folder)),
        "LC_MESSAGES": "C",  # errors in the language that the diagnosis reads
        **_WITHOUT_STALE_OBJECTS,
    }


def _as_one_word(compiler: _toolchain.Tool, folder: Path) -> Path:
    """The compiler as torch takes it: one word, so ``CXX="ccache g++"`` becomes a script."""
    program, *arguments = compiler.command
    found = shutil.which(program) or program
    if not arguments:
        return Path(found).absolute()
    script = folder / "cxx"
    script.write_text(f'#!/bin/sh\nexec {shlex.join([os.path.abspath(found), *arguments])} "$@"\n')
    script.chmod(0o755)
    return script
