"""Which files went into a build beside its sources, and which of them are the extension's own."""

from __future__ import annotations

import functools
import os
import re
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ops._errors import BuildError
from ops.jit import _flags, _mentioned
from ops.jit._compile import _toolchain
from ops.jit._spec import Spec

_WORD = re.compile(r"(?:\\[ \t#]|[^ \t])+")
_LARGEST = 1 << 24  # bytes of a text


@dataclass(frozen=True)
class Read:
    """The files that a build has read, as the compilers named them.

    Attributes:
        own: the headers that nobody vouches for, and the files that assembly reads.
        vouched: the headers of torch, CUDA and the system.
    """

    own: list[Path]
    vouched: list[Path]


def read_by(spec: Spec, folder: Path) -> Read:
    """What the build in ``folder`` has read.

    Raises:
        BuildError: a name cannot be understood, so that nobody could tell when the file changes.
    """
    vouchers = _vouchers()
    roots = [root for root in spec.header_roots if root.resolve() not in vouchers]
    sources = {path.resolve() for path in spec.sources}
    inner, real = folder.resolve(), functools.cache(Path.resolve)
    read = Read([], [])
    for file in folder.glob("*.o"):
        if not file.with_name(f"{file.name}.d").is_file():
            raise BuildError(
                f"{spec.name}: the compiler did not say which headers it read for {file.name}: "
                f"flags must not have the list written elsewhere (-MF)",
                passing=False,
            )
    for name, by_nvcc in sorted(_named(folder)):
        path = folder / name
        if not path.is_file():
            if by_nvcc and path.is_relative_to(folder):
                continue  # it lists the names in #line too
            raise BuildError(
                f"{spec.name}: the compiler read a header whose name it does not pass on, but as "
                f"{str(path)!r}: a header's path must be of ordinary characters",
                passing=False,
            )
        parent = real(path.parent)
        resolved = path.resolve() if path.is_symlink() else parent / path.name
        if resolved in sources or parent.is_relative_to(inner):
            continue
        own = any(path.is_relative_to(root) for root in roots)
        vouched = not own and any(resolved.is_relative_to(place) for place in vouchers)
        (read.vouched if vouched else read.own).append(path)
    read.own.extend(path for path in _read_by_assembly(spec, read.own) if path not in read.own)
    return read


def texts(spec: Spec, headers: list[Path]) -> list[bytes]:
    """All the text of the extension's own, flags too, as the preprocessor sees it."""
    flags = (*spec.extra_cflags, *spec.extra_cuda_cflags)
    given = (*spec.cpp_sources, *spec.cuda_sources, _flags.as_text(flags))
    files = map(text_of, (*spec.sources, *headers))
    return [*files, *(_mentioned.text(one.encode(errors="surrogateescape")) for one in given)]


def text_of(path: Path) -> bytes:
    """A file as the preprocessor sees it."""
    with path.open("rb") as file:
        return _mentioned.text(file.read(_LARGEST))


def is_vouched_for(folder: Path) -> bool:
    """Whether nobody but torch, CUDA or the system has headers in a folder."""
    return folder.resolve() in _vouchers()


def _read_by_assembly(spec: Spec, headers: list[Path]) -> Iterator[Path]:
    for name in sorted(_mentioned.files(texts(spec, headers))):
        for folder in (Path("/"),) if name.startswith("/") else spec.header_roots:
            if os.path.isfile(folder / name):
                yield folder / name


def _named(folder: Path) -> set[tuple[str, bool]]:
    """The files in the lists that the compilers have left, each with whether nvcc names it.

    Ninja's own reading of them knows no quotes and folds ``link/..``.
    """
    found = set()
    for path in folder.glob("*.d"):
        by_nvcc = path.name.endswith(".cuda.o.d")
        text = os.fsdecode(path.read_bytes()).replace("\\\n", " ")
        for line in text.split("\n"):
            for word in _WORD.findall(re.split(r":(?:[ \t]|$)", line, maxsplit=1)[-1]):
                found.add((_unquoted(word, by_nvcc), by_nvcc))
    return found


def _unquoted(word: str, by_nvcc: bool) -> str:
    if by_nvcc:
        return word.replace("\\ ", " ")
    spaced = re.sub(r"(\\*)\\([ \t])", lambda m: m[1][len(m[1]) // 2 :] + m[2], word)
    return spaced.replace("\\#", "#").replace("$$", "$")


def _vouchers() -> list[Path]:
    """Folders whose headers the identity of torch, nvcc or the compiler vouches for."""
    home, compiler = _toolchain.cuda_home(), _toolchain.cxx()
    torchs = Path(torch.__file__).parent
    places = [torchs, torchs / "include", torchs / "include/torch/csrc/api/include"]
    places += [Path(sysconfig.get_path("include"))]
    places += [Path("/usr/include"), Path("/usr/lib"), Path("/usr/lib64")]
    if sys.platform == "darwin":
        places += [Path("/Library/Developer"), Path("/Applications/Xcode.app")]
    if compiler:  # one of conda, say, has its own headers below its prefix, beside users' ones
        prefix = compiler.path.parent.parent
        places += [prefix / "lib", prefix / "include" / "c++", *prefix.glob("*-*-*")]
    return [place.resolve() for place in [*places, *([home, home / "include"] if home else [])]]
