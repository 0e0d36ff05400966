"""What the loader's tests share. Its extensions are a line of C++ without torch: quick to build."""

from __future__ import annotations

import ctypes
import shutil

from ops.jit import Extension, Spec

COMPILER = shutil.which("c++") or shutil.which("g++")  # before any test sets $CXX
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
    return list((cache / "staging").iterdir())
