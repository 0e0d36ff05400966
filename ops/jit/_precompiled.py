"""torch's default header, precompiled: in the cache like any entry, made in the background.

``torch/extension.h`` is ten seconds of parsing and more. Once an extension with default headers has
been built, a process of its own precompiles the header with the same flags, at the lowest priority;
builds that come after it take what it made. Nothing ever waits for it. g++ only.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from ops import _config
from ops._errors import BuildTimeoutError, JitopsError
from ops.jit import _flags, _key
from ops.jit._cache import _inventory, _lock, _staging, _store, _usage
from ops.jit._compile import _hardware, _toolchain
from ops.jit._spec import Spec

NAME = "torch_extension_h"
_HEADER = "torch/extension.h"
_FILE = "extension.h.gch"
_NEEDS_MEMORY = 6 << 30  # beside what the machine is doing: the compiler takes two of them
_NEEDS_DISK = 4 << 30  # the file takes one
_CHANGES_IT = ("-include", "-imacros", "--include", "--imacros", "-x", "-I", "@")  # flags
_TORCHS = ("ATen", "c10", "caffe2", "pybind11", "torch")


def folders(spec: Spec, staging: Path, root: Path) -> list[Path]:
    """The folder to look for headers in first, where there is a precompiled one for ``spec``."""
    asked = _request(spec)
    entry = _find(asked) if asked else None
    if entry is None or not _usage.hold(entry.folder):
        return []
    folder = staging / "precompiled"
    (folder / "torch").mkdir(parents=True)
    (folder / "torch" / _FILE).symlink_to(entry.library)
    return [folder]


def begin(spec: Spec, staging: Path, root: Path) -> None:
    """Have the header precompiled for builds to come, as ``spec`` was just built in ``staging``."""
    asked = _request(spec)
    if (
        asked is None
        or not _config.settings().pch
        or len(os.sched_getaffinity(0)) < 2
        or _hardware.memory_limit() < _NEEDS_MEMORY
        or shutil.disk_usage(root).free < _NEEDS_DISK
        or _config.settings().cache_max_size < _NEEDS_DISK // 4
        or _find(asked)
    ):
        return
    job = {"asked": asked, "command": _command(staging), "root": str(root)}
    # The shell ends at once: nobody has to wait for its child, and none is left a zombie.
    subprocess.run(
        [
            "/bin/sh",
            "-c",
            '"$@" >/dev/null 2>&1 &',
            "sh",
            *("nice", "-n", "19", sys.executable, "-m", __name__, json.dumps(job)),
        ],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(_place()), *_python_path()])),
        },
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        check=False,
    )


def _place() -> Path:
    return Path(__file__).resolve().parents[2]


def _python_path() -> list[str]:
    return os.environ.get("PYTHONPATH", "").split(os.pathsep)


def _request(spec: Spec) -> dict[str, Any] | None:
    """What a precompiled header for ``spec`` depends on; ``None`` where none can serve."""
    compiler = _toolchain.cxx()
    if not spec.inline or spec.no_implicit_headers or spec.is_standalone or compiler is None:
        return None
    identity = _toolchain.identity(compiler)
    if not identity[0].startswith("gcc version"):
        return None
    if any(word.startswith(_CHANGES_IT) for word in _flags.words(spec.extra_cflags)):
        return None
    if any((root / name).exists() for root in spec.extra_include_paths for name in _TORCHS):
        return None
    whole = _key.request(spec)
    same = ("format", "cflags", "cuda", "cxx_arguments", "torch", "cxx11_abi", "environment")
    return {**{name: whole[name] for name in same}, "python": sys.version, "cxx": identity}


def _find(asked: dict[str, Any]) -> _store.Entry | None:
    digest = _key.digest(asked)
    return _store.find(_store.stem(NAME, digest), lambda manifest: manifest["digest"] == digest)


def _command(staging: Path) -> list[str]:
    """The command that compiled the source in ``staging``, to precompile the header instead."""
    rules = dict(
        line.split(" = ", 1)
        for line in (staging / "build.ninja").read_text().splitlines()
        if line.startswith(("cxx = ", "cflags = "))
    )
    words = shlex.split(rules["cflags"])
    kept = [word for word in words if not word.startswith(("-DTORCH_EXTENSION_NAME", "-I"))]
    header = Path(torch.__file__).parent / "include" / _HEADER
    return [*shlex.split(rules["cxx"]), "-x", "c++-header", *kept, str(header)]


# ---- in the process of its own -------------------------------------------------------------------


def _make(asked: dict[str, Any], command: list[str], root: Path) -> None:
    digest = _key.digest(asked)
    stem = _store.stem(NAME, digest)
    try:
        with _lock.exclusive(_store.lock_path(root, stem), NAME, 0.1, lambda said: None):
            if _find(asked):
                return
            with _staging.staging(root, stem) as folder:
                started = time.time()
                subprocess.run([*command, "-o", str(folder / _FILE)], check=True, cwd=folder)
                about = {
                    "name": NAME,
                    "digest": digest,
                    "request": asked,
                    "seconds": round(time.time() - started, 3),
                    "built": time.time(),
                }
                entry = _store.publish(root, folder, folder / _FILE, {}, about)
    except BuildTimeoutError:
        return  # another one is at it
    _inventory.evict(root, _config.settings().cache_max_size, spare=entry.folder)


if __name__ == "__main__":
    told = json.loads(sys.argv[1])
    try:
        _make(told["asked"], told["command"], Path(told["root"]))
    except (JitopsError, OSError, subprocess.SubprocessError) as error:
        raise SystemExit(str(error)) from error  # nobody reads it: the next build tries again
