"""``torch/extension.h`` precompiled, which is most of the time of a build with default headers.

Once such a build is done, a background process precompiles the header with the same flags, at the
lowest priority. Later builds take the result; nothing ever waits for it. g++ only. The header is
built like any extension: its flags say ``-x c++-header``, and the linker has no part in it.
"""

import contextlib
import functools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from ops import _config
from ops._errors import BuildTimeoutError
from ops.jit import _inputs, _key, _progress
from ops.jit._cache import _entries, _publish
from ops.jit._compile import _build, _compilers, _cpu
from ops.jit._spec import Spec

NAME = "torch_extension_h"
_HEADER = "torch/extension.h"
_NEEDS = 4 << 30  # bytes that are free in memory, of which the compiler takes 3 GB, and on the disk
_NEEDS_CACHE = 3 << 29  # bytes: the file takes up to two thirds
# Not "python -m", because the current folder or PYTHONPATH may have an "ops" of its own. This very
# one is to run, with the same sys.path. Where memory ends, this process goes first.
_PROCESS = """
import sys
package, told, *sys.path[:] = sys.argv[1:]
import ast, contextlib, importlib.util, os
with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
    file.write("1000")
spec = importlib.util.spec_from_file_location("ops", package)
module = sys.modules["ops"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
for name in ("JITOPS_DEBUG", "JITOPS_SANITIZE"):
    os.environ.pop(name, None)  # the header's flags have theirs
import ops.jit
ops.jit.Extension(ops.jit.Spec(**ast.literal_eval(told))).build()
"""
_FINDS_HEADERS = (*_compilers.HEADER_VARIABLES, "GCC_EXEC_PREFIX", "COMPILER_PATH")


@contextlib.contextmanager
def include_dir(spec: Spec, folder: Path) -> Iterator[list[Path]]:
    """Yield the folders to search first for a build in ``folder``: there g++ finds the header."""
    header = header_for(spec)
    entry = None
    if header:
        digest = _key.digest(_key.request(header))
        accepts = functools.partial(_inputs.accepts, header, digest)
        entry = _entries.find(_entries.entry_name(NAME, digest), accepts)
    if entry is None or not _entries.mark_in_use(entry.folder):
        yield []
        return
    first = folder / "precompiled"
    (first / "torch").mkdir(parents=True)
    (first / f"{_HEADER}.gch").symlink_to(entry.library)
    # For text that includes it once more, because g++ would look beside the precompiled one.
    (first / _HEADER).symlink_to(Path(torch.__file__).parent / "include" / _HEADER)
    try:
        yield [first]
    finally:
        _entries.release(entry.folder)


def header_for(spec: Spec) -> Spec | None:
    """Describe the header that serves ``spec``, as an extension; ``None`` where none can serve."""
    if not _config.settings().pch or not spec.inline or spec.no_implicit_headers:
        return None
    # These could put another header in the place of this one, or before it.
    if spec.extra_include_paths or any(os.environ.get(name) for name in _FINDS_HEADERS):
        return None
    flags = " ".join((*spec.extra_cflags, *_compilers.words_in("CXX")[1:]))
    if re.search(r"/|-include|-imacros|(^|\s)-x", flags) or not _build.is_gcc():
        return None
    return Spec(
        name=NAME,
        cpp_sources=(f"// Python {sys.version}\n",),  # whose headers g++ does not look at again
        extra_cflags=(*spec.extra_cflags, "-x", "c++-header"),
        with_cuda=spec.uses_cuda,
    )


def schedule(spec: Spec, root: Path) -> None:
    """Have the header precompiled for later builds, as ``spec`` was just built.

    A failure is said, and costs no build.
    """
    try:
        header, python = header_for(spec), _compilers.python()
        if header is None or python is None or _cpu.cores() < 2:
            return
        room = min(_cpu.free_memory(), shutil.disk_usage(root).free)
        if room < _NEEDS or _config.settings().cache_max_size < _NEEDS_CACHE:
            return
        lock = _publish.lock_path(root, NAME, _key.digest(_key.request(header)))
        with _publish.exclusive(lock, NAME, 0.0, lambda _: None):
            _progress.say(
                f"precompiling {_HEADER} in the background, for builds to come: a minute of one "
                f"core, 0.8 GB of the cache (JITOPS_PCH=0: never)"
            )
            _spawn(python, header)
    except BuildTimeoutError:
        return  # it is being made
    except Exception as error:
        _progress.say(f"{_HEADER} is not precompiled: {error}")


def _spawn(python: str, header: Spec) -> None:
    """Build the header in a process that outlives this one, and whose errors nobody reads."""
    fields = ("name", "cpp_sources", "extra_cflags", "with_cuda")
    told = repr({field: getattr(header, field) for field in fields})
    package = str(Path(__file__).resolve().parents[1] / "__init__.py")
    path = [one for one in sys.path if os.path.isabs(one)]  # not the current folder
    # The shell ends at once, so that nobody has to wait for its child, and none is left a zombie.
    shell = ["/bin/sh", "-c", 'nice -n 19 "$@" </dev/null >/dev/null 2>&1 &', "sh"]
    subprocess.run([*shell, python, "-c", _PROCESS, package, told, *path], start_new_session=True,
                   stdin=subprocess.DEVNULL, check=False)  # fmt: skip
