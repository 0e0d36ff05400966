"""What the loader's tests share. Its extensions are a line of C++ without torch: quick to build."""

from __future__ import annotations

import ctypes
import os
import shutil
import traceback

from ops.jit import Extension, Spec


def _compiler():
    """The compiler itself: a link to ccache would look for it in the folders of the tests."""
    folders = os.environ["PATH"].split(os.pathsep)
    found = (shutil.which(name, path=folder) for name in ("c++", "g++") for folder in folders)
    return next(path for path in found if path and "ccache" not in os.path.realpath(path))


COMPILER = _compiler()  # before any test sets $CXX
ANSWER = 'extern "C" int answer() { return 42; }\n'


def extension(source, **changes):
    """The extension of the fixture ``source``."""
    return Extension(
        Spec(
            name="answer",
            sources=(source,),
            extra_include_paths=(source.parent / "include",),
            is_python_module=False,
            **changes,
        )
    )


def answer(library):
    """What the library of that extension answers."""
    return ctypes.CDLL(str(library)).answer()


def entries(cache):
    """The folders of published entries."""
    return [path.parent for path in cache.glob("*/*/manifest.json")]


def leftovers(cache):
    """What builds have left lying about."""
    staging = cache / "staging"
    return list(staging.iterdir()) if staging.is_dir() else []


def forked(work):
    """How a fork of this process ends that does some work: 0, a status, or minus a signal."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
