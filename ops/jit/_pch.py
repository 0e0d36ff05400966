"""``torch/extension.h`` precompiled, which is most of the time of a build with default headers.

Once such a build is done, a background process (:func:`main`) precompiles the header with the same
flags, at the lowest priority. Later builds take the result; nothing ever waits for it. g++ only.
The precompiled header is an entry of the cache like any other.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ops import _config
from ops._errors import BuildTimeoutError, JitopsError
from ops.jit import _flags, _inputs, _key, _progress, _record
from ops.jit._cache import _entries, _eviction, _publish
from ops.jit._compile import _build, _compilers, _cpu
from ops.jit._spec import Spec

NAME = "torch_extension_h"
_FILE = "extension.h.gch"
_HEADER = "torch/extension.h"
_NEEDS_MEMORY = 4 << 30  # bytes: the compiler takes three of them
_NEEDS_DISK = 4 << 30  # bytes: the file takes up to one
_NEEDS_CACHE = 3 << 29  # bytes
# Not "python -m", because the current folder or PYTHONPATH may have an "ops" of its own. This very
# one is to run, with the same sys.path.
_PROCESS = """
import sys
sys.path[:] = sys.argv[2:]
import importlib.util
spec = importlib.util.spec_from_file_location("ops", sys.argv[1])
module = sys.modules["ops"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
from ops.jit import _pch
_pch.main()
"""
# Flags that read no file, all of which the header is precompiled with too.
_HARMLESS = re.compile(
    r"-(O\w*|g[\w-]*|std=[\w+]+|[DU][^/]*|W[a-z][\w=+-]*|w|m[\w=.+-]+|pthread|pipe|pedantic|ansi"
    r"|f(?!plugin|profile|auto-profile|module|pch|preprocessed|directives)[\w=,.+-]+)"
)
_FINDS_HEADERS = (*_compilers.HEADER_VARIABLES, "GCC_EXEC_PREFIX", "COMPILER_PATH")
_FOR_LINKERS = ("LIBRARY_PATH", "LD_RUN_PATH", "LDEMULATION", "GNUTARGET", "SOURCE_DATE_EPOCH")


@contextlib.contextmanager
def include_dir(spec: Spec, folder: Path) -> Iterator[list[Path]]:
    """Yield the folders to search first for a build in ``folder``: there g++ finds the header."""
    asked = _request(spec) if _config.settings().pch else None
    entry = _find(asked) if asked else None
    if entry is None or not _entries.mark_in_use(entry.folder):
        yield []
        return
    first = folder / "precompiled"
    (first / "torch").mkdir(parents=True)
    (first / "torch" / _FILE).symlink_to(entry.library)
    # For text that includes it once more, because g++ would look beside the precompiled one.
    (first / _HEADER).symlink_to(Path(torch.__file__).parent / "include" / _HEADER)
    try:
        yield [first]
    finally:
        _entries.release(entry.folder)


def _request(spec: Spec) -> dict[str, Any] | None:
    """Return the request for a header that serves ``spec``; ``None`` where none can serve."""
    compiler = _compilers.cxx()
    if not spec.inline or spec.no_implicit_headers or spec.is_standalone or compiler is None:
        return None
    # These could put another header in the place of one that it holds.
    if spec.extra_include_paths or any(os.environ.get(name) for name in _FINDS_HEADERS):
        return None
    flags = [*_flags.words(spec.extra_cflags), *_compilers.words_in("CXX")[1:]]
    if not all(map(_HARMLESS.fullmatch, flags)) or not _build.is_gcc():
        return None
    whole = _key.request(spec)
    same = ("format", "cflags", "cuda", "cxx_arguments", "torch", "cxx11_abi", "cpu")
    variables = whole["environment"].items()
    return {
        **{name: whole[name] for name in same},
        "environment": {name: value for name, value in variables if name not in _FOR_LINKERS},
        "python": sys.version,
    }


def _spec(asked: dict[str, Any]) -> Spec:
    flags = tuple(asked["cflags"])
    return Spec(name=NAME, cpp_sources=("",), extra_cflags=flags, with_cuda=asked["cuda"])


def _find(asked: dict[str, Any]) -> _entries.Entry | None:
    digest, spec = _key.digest(asked), _spec(asked)

    def accepts(manifest: _entries.Manifest) -> bool:
        return manifest.get("digest") == digest and _inputs.accepts(spec, manifest)

    return _entries.find(_entries.entry_name(NAME, digest), accepts)


def schedule(spec: Spec, folder: Path, root: Path) -> None:
    """Have the header precompiled for later builds, as ``spec`` was just built in ``folder``.

    A failure is said, and costs no build.
    """
    try:
        asked = _request(spec)
        python = _compilers.python()
        if (
            asked is None
            or python is None
            or not _config.settings().pch
            or _cpu.cores() < 2
            or _cpu.free_memory() < _NEEDS_MEMORY
            or shutil.disk_usage(root).free < _NEEDS_DISK
            or _config.settings().cache_max_size < _NEEDS_CACHE
            or _is_being_made(asked, root)
        ):
            return
        _progress.say(
            f"precompiling {_HEADER} in the background, for builds to come: a minute of one core, "
            f"0.8 GB of the cache (JITOPS_PCH=0: never)"
        )
        _spawn(python, {"asked": asked, "command": _command(folder), "root": str(root)})
    except Exception as error:
        _progress.say(f"{_HEADER} is not precompiled: {error}")


def _is_being_made(asked: dict[str, Any], root: Path) -> bool:
    path = _publish.lock_path(root, _entries.entry_name(NAME, _key.digest(asked)))
    try:
        with _publish.exclusive(path, NAME, 0.0, lambda _: None):
            return False
    except BuildTimeoutError:
        return True


def _command(folder: Path) -> list[str]:
    """Return the command that compiled the source in ``folder``, without the source."""
    compiler = _compilers.cxx()
    script = (folder / "build.ninja").read_text(encoding="utf-8", errors="surrogateescape")
    cflags = re.search(r"^cflags = (.*)$", script, re.MULTILINE)
    words = shlex.split(cflags[1].replace("$$", "$")) if cflags else []
    kept = [word for word in words if not word.startswith(("-DTORCH_EXTENSION_NAME", "-I"))]
    return [*(compiler.command if compiler else ()), *kept]


def _spawn(python: str, job: dict[str, Any]) -> None:
    """Start the process. It reads its job, however long, from a file without a name."""
    # The shell ends at once, so that nobody has to wait for its child, and none is left a zombie.
    # By itself it would give the child no stdin.
    script = 'exec 3<&0; "$@" <&3 3<&- >/dev/null 2>&1 &'
    path = [one for one in sys.path if os.path.isabs(one)]  # not the current folder
    package = str(Path(__file__).resolve().parents[1] / "__init__.py")
    command = ["nice", "-n", "19", python, "-c", _PROCESS, package, *path]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as told:
        json.dump(job, told)
        told.flush()
        told.seek(0)
        shell = ["/bin/sh", "-c", script, "sh", *command]
        subprocess.run(shell, stdin=told, start_new_session=True, check=False)


# ---- the background process ----------------------------------------------------------------------


def main() -> None:
    """Precompile the header, as stdin tells."""
    with contextlib.suppress(OSError):  # where memory ends, this process goes first
        Path("/proc/self/oom_score_adj").write_text("1000")
    told = json.load(sys.stdin)
    root, asked = Path(told["root"]), told["asked"]
    name = _entries.entry_name(NAME, _key.digest(asked))
    try:
        with _publish.exclusive(_publish.lock_path(root, name), NAME, 0.1, lambda _: None):
            if _find(asked):
                return
            with _publish.staging(root, name) as folder:
                entry = _make(asked, told["command"], root, folder)
        if entry:
            _eviction.evict(root, _config.settings().cache_max_size, newest=entry.folder)
    except BuildTimeoutError:
        return  # another one is at it
    except (JitopsError, OSError, subprocess.SubprocessError) as error:
        raise SystemExit(str(error)) from error  # nobody reads it: the next build tries again


def _make(
    asked: dict[str, Any], command: list[str], root: Path, folder: Path
) -> _entries.Entry | None:
    started, spec, file = time.time(), _spec(asked), folder / _FILE
    (folder / "extension.h").write_text(f"#include <{_HEADER}>\n")
    (folder / "extension.o").touch()  # the report is named after it, as for a source
    reports = ["-fno-canonical-system-headers", "-MD", "-MF", "extension.o.d"]
    words = [*command, *reports, "-x", "c++-header", "extension.h", "-o", _FILE]
    subprocess.run(words, check=True, cwd=folder)
    with (folder / "search.txt").open("wb") as search:
        words = [*command, "-E", "-v", "-x", "c++", os.devnull]
        subprocess.run(words, stdout=search, stderr=subprocess.STDOUT, check=True, cwd=folder)
    recorded = _record.record(spec, folder, linked=False)
    if _inputs.changed_since(spec, recorded, started):
        return None
    manifest = {"name": NAME, "digest": _key.digest(asked), "request": asked, "replaceable": True}
    return _publish.publish(root, folder, file, {**manifest, **recorded, "built": time.time()})
