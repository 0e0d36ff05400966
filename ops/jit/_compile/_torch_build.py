"""torch's own ``load`` and ``load_inline``, which write the ninja file and have us run it.

They run in a copy of ``torch.utils.cpp_extension`` that only one build uses, and that sees an
environment of its own. So no build changes torch's module, which other threads may use, or in which
somebody may have replaced ``load`` by ours.
"""

from __future__ import annotations

import builtins
import functools
import importlib.util
import logging
import os
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ops._errors import ToolchainError
from ops.jit._compile import importing


class _Os(types.ModuleType):
    """The module ``os`` with other environment variables."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        super().__init__("os")
        self.environ = environ

    def getenv(self, name: str, default: Any = None) -> Any:
        return self.environ.get(name, default)

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


def module(environ: Mapping[str, str], cuda_home: Path | None, run: Callable[[str], None]) -> Any:
    """Make a copy of ``torch.utils.cpp_extension`` for one build."""
    path = Path(torch.__file__).parent / "utils" / "cpp_extension.py"
    spec = importlib.util.spec_from_file_location("torch.utils.cpp_extension", path)
    if spec is None or spec.loader is None:
        raise ToolchainError(f"torch {torch.__version__} has no {path}")
    copy: Any = importlib.util.module_from_spec(spec)
    copy.__builtins__ = {**vars(builtins), "__import__": _import}
    logger = logging.getLogger(copy.__name__)
    logger.addFilter(_is_news)
    try:
        with importing:
            spec.loader.exec_module(copy)
    finally:
        logger.removeFilter(_is_news)
    replaced = {
        "_run_ninja_build": lambda folder, *_, **__: run(folder),
        "_import_module_from_library": lambda *_, **__: None,
        "verify_ninja_availability": lambda: None,
        "get_compiler_abi_compatibility_and_version": lambda compiler: (True, None),
    }
    if missing := [name for name in replaced if not hasattr(copy, name)]:
        raise ToolchainError(
            f"torch {torch.__version__} builds extensions in a way that this version of jitops "
            f"does not know: it has no {', '.join(missing)}"
        )
    opened = functools.partial(open, encoding="utf-8", errors="surrogateescape")
    vars(copy).update(replaced, os=_Os(environ), open=opened)
    if cuda_home is not None:
        copy.CUDA_HOME = str(cuda_home)
    return copy


class _Setuptools(types.ModuleType):
    """Stands for setuptools, which takes long to import and which only ``setup.py`` needs."""

    def __getattr__(self, name: str) -> Any:
        return type(name, (), {})


def _import(name: str, *arguments: Any) -> Any:
    if name.partition(".")[0] == "setuptools":
        return _Setuptools("setuptools")
    return builtins.__import__(name, *arguments)


def _is_news(record: logging.LogRecord) -> bool:
    """Drop torch's warning about a CUDA toolkit on a machine without a GPU."""
    return "No CUDA runtime is found" not in record.getMessage()
