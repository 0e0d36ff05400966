"""torch's default header, precompiled: in the cache like any entry, made in the background.

``torch/extension.h`` is ten seconds of parsing and more. Once an extension with default headers has
been built, a process of its own (:mod:`ops.jit._precompiler`) precompiles the header with the same
flags, at the lowest priority; builds that come after it take what it made. Nothing ever waits for
it. g++ only.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from ops import _config
from ops._errors import BuildError, BuildTimeoutError
from ops.jit import _flags, _key, _shell
from ops.jit._cache import _lock, _staging, _store, _usage
from ops.jit._compile import _build, _hardware, _instantiate, _progress, _toolchain
from ops.jit._spec import Spec

NAME = "torch_extension_h"
FILE = "extension.h.gch"
_HEADER = "torch/extension.h"
_NEEDS_MEMORY = 6 << 30  # beside what the machine is doing: the compiler takes three of them
_NEEDS_DISK = 4 << 30  # the file takes one
_NEEDS_CACHE = 3 << 29
# The process that makes it. Not "python -m": the current folder or PYTHONPATH may have an "ops" of
# its own, and this very one is to run, with all else found where it is found here.
_PROCESS = """
import sys
sys.path[:] = sys.argv[2:]
import importlib.util
spec = importlib.util.spec_from_file_location("ops", sys.argv[1])
module = sys.modules["ops"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
from ops.jit import _precompiler
_precompiler.main()
"""
# Flags that read no file, all of which the header is precompiled with too.
_HARMLESS = re.compile(
    r"-(O\w*|g[\w-]*|std=[\w+]+|[DU][^/]*|W[a-z][\w=+-]*|w|m[\w=.+-]+|pthread|pipe|pedantic|ansi"
    r"|f(?!plugin|profile|auto-profile|module|pch|preprocessed|directives)[\w=,.+-]+)"
)
_FINDS_HEADERS = (*_flags.LEAD_TO_HEADERS, "GCC_EXEC_PREFIX", "COMPILER_PATH")
# Overloads in these namespaces would be found by templates that are instantiated at the end of the
# file, and are not by those that the header holds.
_REOPENS = re.compile(
    r"\bnamespace\s+(?:::)?(?:std|c10|at|torch|caffe2|pybind11|py)\b(?:\s*::\s*\w+)*\s*\{"
)
# Errors that a build without the precompiled header may not have: for a text that specialises what
# the header's functions use it is too late.
_SUSPECT = re.compile(
    r"after instantiation|internal compiler error|undefined (reference|symbol)|\.gch\b"
)


# ---- used ----------------------------------------------------------------------------------------


def serve(
    spec: Spec, staging: Path, root: Path, build: Callable[[list[Path]], _build.Built]
) -> _build.Built:
    """What ``build`` makes in ``staging``, given the folders to look for headers in first.

    A precompiled header is verified while the compiler reads it, since that takes most of a second.
    If it is damaged, or may be what the build has failed of, ``build`` is called once more without.
    """
    asked = request(spec) if _config.settings().pch else None
    entry = find(asked) if asked else None
    if entry is None or not _usage.hold(entry.folder):
        return build([])
    with ThreadPoolExecutor(1) as pool:
        whole = pool.submit(_store.verify, entry)
        try:
            built = build([lay(staging, entry.library)])
        except BuildError as error:
            if whole.result() and not _may_blame_the_header(error):
                raise
            _progress.say(f"{spec.name}: trying once more without the precompiled header")
        else:
            if whole.result() and not any(map(_reopens, built.read.own)):
                return built
    if not whole.result():
        _staging.discard(root, entry.folder)  # to be made anew
    for path in staging.iterdir():
        if path.name != _staging.ALIVE:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    return build([])


def _reopens(header: Path) -> bool:
    try:
        return bool(_REOPENS.search(header.read_text(errors="replace")))
    except OSError:
        return True  # edited just now: the build is about to be refused for that


def lay(folder: Path, precompiled: Path) -> Path:
    """A folder in which g++ finds the precompiled header as ``torch/extension.h``."""
    first = folder / "precompiled"
    (first / "torch").mkdir(parents=True)
    (first / "torch" / FILE).symlink_to(precompiled)
    # For text that includes it once more: g++ would look for it where it found the precompiled one.
    (first / _HEADER).symlink_to(_torchs_header())
    return first


def _torchs_header() -> Path:
    return Path(torch.__file__).parent / "include" / _HEADER


def _may_blame_the_header(error: BuildError) -> bool:
    try:
        said = Path(error.log or "").read_text(errors="replace")
    except OSError:
        return True
    return bool(_SUSPECT.search(said))


def request(spec: Spec) -> dict[str, Any] | None:
    """What a precompiled header for ``spec`` depends on; ``None`` where none can serve."""
    compiler = _toolchain.cxx()
    if not spec.inline or spec.no_implicit_headers or spec.is_standalone or compiler is None:
        return None
    identity = _toolchain.identity(compiler)
    if not identity[0].startswith("gcc version"):
        return None
    # Whatever could put another header in the place of one that it holds.
    if spec.extra_include_paths or any(os.environ.get(name) for name in _FINDS_HEADERS):
        return None
    flags = [*_flags.words(spec.extra_cflags), *_toolchain.words_in("CXX")[1:]]
    if not all(map(_HARMLESS.fullmatch, flags)) or any(map(_REOPENS.search, spec.cpp_sources)):
        return None
    whole = _key.request(spec)
    same = ("format", "cflags", "cuda", "cxx_arguments", "torch", "cxx11_abi")
    return {
        **{name: whole[name] for name in same},
        "environment": {k: v for k, v in whole["environment"].items() if k not in _key.LATER},
        "python": sys.version,
        "cxx": identity,
        "plugin": _instantiate.VERSION,
    }


def find(asked: dict[str, Any]) -> _store.Entry | None:
    """The precompiled header for a request, not verified."""
    digest = _key.digest(asked)
    return _store.glance(_store.stem(NAME, digest), lambda manifest: manifest["digest"] == digest)


# ---- ordered -------------------------------------------------------------------------------------


def begin(spec: Spec, staging: Path, root: Path) -> None:
    """Have the header precompiled for builds to come, as ``spec`` was just built in ``staging``."""
    asked = request(spec)
    if (
        asked is None
        or not _config.settings().pch
        or len(os.sched_getaffinity(0)) < 2
        or _hardware.memory_limit() < _NEEDS_MEMORY
        or _free(root) < _NEEDS_DISK
        or _config.settings().cache_max_size < _NEEDS_CACHE
        or find(asked)
        or _is_being_made(asked, root)
    ):
        return
    _progress.say(
        f"precompiling {_HEADER} in the background, for builds to come: a minute of one core, a "
        f"gigabyte of the cache (JITOPS_PCH=0: never)"
    )
    try:
        _order({"asked": asked, "command": _command(staging), "root": str(root)})
    except OSError as error:  # no reason to lose what has just been built
        _progress.say(f"{_HEADER} is not precompiled: {error}")


def _is_being_made(asked: dict[str, Any], root: Path) -> bool:
    path = _store.lock_path(root, _store.stem(NAME, _key.digest(asked)))
    try:
        with _lock.exclusive(path, NAME, 0.0, lambda _: None):
            return False
    except BuildTimeoutError:
        return True


def _free(root: Path) -> int:
    try:
        return shutil.disk_usage(root).free
    except OSError:
        return 0  # who knows: then none is made


def _order(job: dict[str, Any]) -> None:
    """Start the process: it is told its job by a file without a name, as long as it may be."""
    # The shell ends at once: nobody has to wait for its child, and none is left a zombie. Left to
    # itself, it would give the child no stdin.
    script = 'exec 3<&0; "$@" <&3 3<&- >/dev/null 2>&1 &'
    path = [one for one in sys.path if os.path.isabs(one)]  # not the current folder
    package = Path(__file__).resolve().parents[1] / "__init__.py"
    python = [sys.executable, "-c", _PROCESS, str(package), *path]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as told:
        json.dump(job, told)
        told.flush()
        told.seek(0)
        subprocess.run(
            ["/bin/sh", "-c", script, "sh", "nice", "-n", "19", *python],
            stdin=told,
            start_new_session=True,
            check=False,
        )


def _command(staging: Path) -> list[str]:
    """The command that compiled the source in ``staging``, to precompile a header instead."""
    rules = dict(
        line.split(" = ", 1)
        for line in (staging / "build.ninja").read_text().splitlines()
        if line.startswith(("cxx = ", "cflags = "))
    )
    words = _shell.split([rules["cflags"]])
    kept = [word for word in words if not word.startswith(("-DTORCH_EXTENSION_NAME", "-I"))]
    return [*_shell.split([rules["cxx"]]), "-x", "c++-header", *kept]
