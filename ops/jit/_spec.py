"""What the user asked to be compiled, checked and frozen: the input of the key and of the build."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ops._errors import ArgumentError, ArgumentTypeError

CUDA_SUFFIXES = (".cu", ".cuh")
SUFFIXES = (".cpp", ".cc", ".cxx", ".c", ".cu")


@dataclass(frozen=True)
class Spec:
    """An extension to build: from files (``sources``) or from text (``cpp_sources`` and so on).

    The fields carry the names and meanings of :func:`torch.utils.cpp_extension.load` and
    :func:`~torch.utils.cpp_extension.load_inline`.
    """

    name: str
    sources: tuple[Path, ...] = ()
    cpp_sources: tuple[str, ...] = ()
    cuda_sources: tuple[str, ...] = ()
    functions: tuple[tuple[str, str], ...] | None = None
    extra_cflags: tuple[str, ...] = ()
    extra_cuda_cflags: tuple[str, ...] = ()
    extra_ldflags: tuple[str, ...] = ()
    extra_include_paths: tuple[Path, ...] = ()
    is_python_module: bool = True
    no_implicit_headers: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise ArgumentTypeError(f"name must be a string, got {type(self.name).__name__}")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,199}", self.name):
            raise ArgumentError(
                f"name must be a C identifier of at most 200 characters, got {self.name!r}"
            )
        if bool(self.sources) == bool(self.cpp_sources or self.cuda_sources):
            raise ArgumentError(
                f"extension {self.name!r} must have either source files or source text"
            )
        objects = [(path.stem, path.suffix in CUDA_SUFFIXES) for path in self.sources]
        for path, built in zip(self.sources, objects, strict=True):
            if not path.is_file():
                raise ArgumentError(f"sources must be files, got {str(path)!r}")
            if path.suffix not in SUFFIXES:
                raise ArgumentError(f"sources must end in {', '.join(SUFFIXES)}, got {str(path)!r}")
            if objects.count(built) > 1:
                raise ArgumentError(f"sources must have distinct names, got {path.stem!r} twice")
        for path in (*self.sources, *self.extra_include_paths):
            if any(character in str(path) for character in "$\n"):
                raise ArgumentError(f"paths must be without $ and newline, got {str(path)!r}")

    @property
    def inline(self) -> bool:
        """Whether the extension is text, to be built by ``load_inline``."""
        return not self.sources

    @property
    def with_cuda(self) -> bool:
        """Whether nvcc has a part in the build."""
        return bool(self.cuda_sources) or any(p.suffix in CUDA_SUFFIXES for p in self.sources)

    @property
    def unit_count(self) -> int:
        """How many files the compilers will be run on."""
        if self.inline:
            return 1 + bool(self.cuda_sources)  # load_inline always writes a main.cpp
        return len(self.sources)

    @property
    def header_roots(self) -> tuple[Path, ...]:
        """Folders whose headers belong to the extension, in the order they are recorded."""
        folders = [*self.extra_include_paths, *(path.parent for path in self.sources)]
        return tuple(dict.fromkeys(folder.resolve() for folder in folders))


def texts(argument: str, value: str | Sequence[str] | None) -> tuple[str, ...]:
    """Source text given as one string, several, or none."""
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    return _strings(argument, value)


def flags(argument: str, value: Sequence[str] | None) -> tuple[str, ...]:
    """A list of flags; a bare string is refused, since torch would take it letter by letter."""
    if isinstance(value, str):
        raise ArgumentTypeError(f"{argument} must be a list of strings, got the string {value!r}")
    return _strings(argument, () if value is None else value)


def paths(argument: str, value: str | Path | Sequence[str | Path] | None) -> tuple[Path, ...]:
    """Paths, made absolute."""
    if value is None:
        return ()
    if isinstance(value, (str, Path)):
        value = [value]
    value = _sequence(argument, value)
    return tuple(Path(_path(argument, item)).absolute() for item in value)


def bindings(
    value: str | Sequence[str] | Mapping[str, str] | None,
) -> tuple[tuple[str, str], ...] | None:
    """The functions to bind with pybind11, each with its docstring."""
    if value is None:
        return None
    if isinstance(value, Mapping):
        return tuple((str(name), str(doc)) for name, doc in value.items())
    return tuple((name, name) for name in texts("functions", value))


def _strings(argument: str, value: Sequence[str]) -> tuple[str, ...]:
    for item in _sequence(argument, value):
        if not isinstance(item, str):
            raise ArgumentTypeError(
                f"{argument} must hold strings only, got {type(item).__name__} in it"
            )
    return tuple(value)


def _sequence(argument: str, value: Sequence[Any]) -> Sequence[Any]:
    if not isinstance(value, Sequence):
        raise ArgumentTypeError(f"{argument} must be a list, got {type(value).__name__}")
    return value


def _path(argument: str, value: str | Path) -> str | Path:
    if not isinstance(value, (str, Path)):
        raise ArgumentTypeError(f"{argument} must be paths, got {type(value).__name__}")
    return value
