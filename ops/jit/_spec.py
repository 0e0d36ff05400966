"""An extension as the user describes it, checked and frozen: the input of the key and the build."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ops._errors import ArgumentError, ArgumentTypeError
from ops.jit import _flags

CUDA_SUFFIXES = (".cu", ".cuh")
# torch passes all else to the C++ compiler, which knows sources by these endings.
SUFFIXES = (".cpp", ".cc", ".cxx", ".c", ".C", ".CPP", ".c++", ".cp", ".S", ".s", *CUDA_SUFFIXES)
RETIRE = "jitops_retire"  # the stem of a source that the loader adds, and its function's name


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
    with_cuda: bool | None = None
    is_python_module: bool = True
    is_standalone: bool = False
    with_pytorch_error_handling: bool = True
    no_implicit_headers: bool = False

    def __post_init__(self) -> None:
        # In the forms that torch takes, such as one text for a list of them.
        for field, take in _TAKES.items():
            object.__setattr__(self, field, take(field, getattr(self, field)))
        _check_name(self.name, self.is_python_module, self.is_standalone)
        if bool(self.sources) == bool(self.cpp_sources or self.cuda_sources):
            raise ArgumentError(f"extension {self.name!r} must have either source files or text")
        _check_sources(self.sources)
        if self.is_standalone and (self.is_python_module or self.inline):
            raise ArgumentError("is_standalone must come with is_python_module=False and files")

    @property
    def inline(self) -> bool:
        """Whether the extension is text, which ``load_inline`` builds."""
        return not self.sources

    @property
    def uses_cuda(self) -> bool:
        """Whether CUDA's headers and libraries have a part in the build."""
        if self.with_cuda is not None:
            return self.with_cuda
        return bool(self.cuda_sources) or any(p.suffix in CUDA_SUFFIXES for p in self.sources)

    @property
    def is_header(self) -> bool:
        """Whether the result is a precompiled header, with which no linker has to do."""
        return "c++-header" in self.extra_cflags

    def label(self, suffix: str, index: int) -> str:
        """Return the file name by which compilers know a text."""
        return f"{self.name}[{index}].{suffix}"

    @property
    def header_roots(self) -> tuple[Path, ...]:
        """The extension's own folders, which may move: headers in them are recorded relatively."""
        sources = (path.parent for path in self.sources)
        return tuple(dict.fromkeys((*self.extra_include_paths, *sources)))


def _check_name(name: str, is_python_module: object, is_standalone: object) -> None:
    """Check a name: it is part of file names, and Python finds a module's function by it."""
    if not isinstance(name, str):
        raise ArgumentTypeError(f"name must be a string, got {type(name).__name__}")
    part = r"[A-Za-z_][A-Za-z0-9_]*"
    if is_python_module and not re.fullmatch(rf"{part}(\.{part})*", name):
        raise ArgumentError(f"name must be C identifiers with dots between, got {name!r}")
    if not re.fullmatch(r"\w[\w.+-]*", name) or len(os.fsencode(name)) > 200:
        raise ArgumentError(
            f"name must be at most 200 bytes of letters, digits, _ . + - (no . + - first), got "
            f"{name!r}"
        )
    if is_standalone and re.search(r"^(used|precompiled)$|\.(cpp|cu|d|json|ninja|o|txt)$", name):
        raise ArgumentError(f"name must not be as of a file of the build, got {name!r}")


def _check_sources(sources: tuple[Path, ...]) -> None:
    objects = [(path.stem, path.suffix in CUDA_SUFFIXES) for path in sources]
    for path, built in zip(sources, objects, strict=True):
        if not os.path.isfile(path):  # unlike Path.is_file, never raises
            raise ArgumentError(f"sources must be files, got {str(path)!r}")
        if path.suffix not in SUFFIXES:
            raise ArgumentError(f"sources must end in {', '.join(SUFFIXES)}, got {str(path)!r}")
        if objects.count(built) > 1:
            raise ArgumentError(f"sources must have distinct names, got {path.stem!r} twice")
        if path.name.startswith("-") or " " in path.name:
            raise ArgumentError(
                f"sources must have names without blanks, and without '-' in front, got "
                f"{path.name!r}: rename it, or name a link to it"
            )
        if path.stem == RETIRE and not built[1]:
            raise ArgumentError(f"sources must not be called {RETIRE}, got {str(path)!r}")


def _strings(argument: str, value: Any) -> tuple[str, ...]:
    """Take one text, several, or none."""
    if isinstance(value, str):
        if value and argument.endswith("flags"):  # torch would take it letter by letter
            raise ArgumentTypeError(f"{argument} must be a list of strings, got {value!r}")
        value = (value,) if value or argument == "cpp_sources" else ()
    for item in _sequence(argument, value):
        if not isinstance(item, str):
            raise ArgumentTypeError(f"{argument} must hold strings only, got {item!r} in it")
        if "\0" in item or item.encode(errors="replace").decode() != item:
            raise ArgumentError(
                f"{argument} must hold text without NUL that UTF-8 can encode, got {item!r}"
            )
    if argument.endswith("flags") and (live := _flags.refused(value or ())):
        raise ArgumentError(
            f"{argument} must hold no {live!r}, because its result may change unseen: write the "
            f"result, or quote it for the shell (\"'-Wl,-rpath,$$ORIGIN'\")"
        )
    return tuple(value or ())


def _paths(argument: str, value: Any) -> tuple[Path, ...]:
    """Take one path, or several, of characters that ninja can pass on."""
    value = [value] if isinstance(value, (str, os.PathLike)) else value
    found = tuple(path(argument, item, "paths") for item in _sequence(argument, value))
    for one in map(str, found):
        if odd := sorted(set("$\n\r\0:|" if argument == "sources" else "$\n\r\0") & set(one)):
            raise ArgumentError(
                f"{argument} must be paths without {' '.join(odd)!r}, which ninja cannot pass on, "
                f"got {one!r}: rename it, or name a link to it"
            )
    return found


def path(argument: str, value: Any, kind: str = "a path") -> Path:
    """Take a path, and make it absolute."""
    if not isinstance(value, (str, os.PathLike)) or not isinstance(os.fspath(value), str):
        raise ArgumentTypeError(f"{argument} must be {kind}, got {type(value).__name__}")
    if argument == "extra_include_paths":
        value = os.fspath(value).strip()  # as torch does
    try:
        # torch takes "x/.." away from the names of sources and of folders of headers.
        return Path(os.path.abspath(value) if kind == "paths" else value).absolute()
    except FileNotFoundError:
        raise ArgumentError(
            f"{argument} must be absolute, since the current folder is gone, got {str(value)!r}"
        ) from None


def _bindings(argument: str, value: Any) -> tuple[tuple[str, str], ...] | None:
    """Take the functions to bind with pybind11, each with its docstring."""
    if value is None:
        return None
    if not isinstance(value, (str, Sequence, Mapping)):
        raise ArgumentError(
            f"{argument} must be a name, a list of names, or names with docstrings, got {value!r}"
        )
    given = value.items() if isinstance(value, Mapping) else value
    given = [given] if isinstance(given, str) else given
    found: tuple[tuple[Any, Any], ...] = tuple(
        one if isinstance(one, tuple) and len(one) == 2 else (one, one) for one in given
    )
    _strings(argument, [text for pair in found for text in pair])
    for name, _ in found:
        if not re.fullmatch(r"[\w:<>, ]+", name) or " " in re.sub(r"<.*>", "", name):
            raise ArgumentError(f"{argument} must be names of C++ functions, got {name!r}")
    return found


def _switch(argument: str, value: Any) -> bool | None:
    if not isinstance(value, bool) and not (argument == "with_cuda" and value is None):
        raise ArgumentTypeError(f"{argument} must be True or False, got {value!r}")
    return value


def _sequence(argument: str, value: Any) -> Sequence[Any]:
    if value is not None and not isinstance(value, Sequence):
        raise ArgumentTypeError(f"{argument} must be a list, got {type(value).__name__}")
    return value or ()


_TAKES: dict[str, Callable[[str, Any], object]] = {
    **dict.fromkeys(("sources", "extra_include_paths"), _paths),
    **dict.fromkeys(("cpp_sources", "cuda_sources"), _strings),
    **dict.fromkeys(("extra_cflags", "extra_cuda_cflags", "extra_ldflags"), _strings),
    "functions": _bindings,
    **dict.fromkeys(("with_cuda", "is_python_module", "is_standalone"), _switch),
    **dict.fromkeys(("with_pytorch_error_handling", "no_implicit_headers"), _switch),
}
