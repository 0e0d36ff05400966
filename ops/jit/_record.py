"""Records, after a build, what it depends on: files by their content, folders by what could hide.

The tools report what they read and where they search. Nothing is inferred from flags. What no tool
can report is refused. Headers of torch, Python, CUDA and the compiler itself are left out, because
the versions of these, which are compared too, tell when they change.
"""

from __future__ import annotations

import os
import re
import sysconfig
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from ops._errors import BuildError
from ops.jit import _flags, _inputs
from ops.jit._compile import _compilers, _reports
from ops.jit._compile._build import Built
from ops.jit._spec import Spec

_LITERAL = rb"(?:\"([^\"\n]+)\"|<([^>\n]+)>)"
_HAS_INCLUDE = re.compile(
    rb"\b__has_(?:include(?:_next)?|embed)\s*(?:\((?:\s|/\*.*?\*/)*(?:"
    + _LITERAL
    + rb")?|$|[^(\s])",
    re.MULTILINE,
)
_GUARD = re.compile(rb"#\s*if(?:n?def\s+|[^\n]*?\bdefined\s*\(?\s*)__has_\w+\s*\)?")
_DEFINED = re.compile(rb"#\s*define\b[^\n]*?" + _LITERAL)
# Assembly reads files that no tool reports.
_ASSEMBLY_READS = re.compile(rb"\.inc(?:bin|lude)\b[ \t]*(?:\\*\"([^\"\\\n]+)\\*\")?")
_PLACE = re.compile(rb"__FILE__|__BASE_FILE__|__builtin_FILE\b|\bsource_location\b")
_COMPILERS_OWN = re.compile(r"/(?:lib/gcc|lib/clang|lib/llvm|include/c\+\+|include/[\w-]+/c\+\+)")
_RECENT = 2_000_000_000  # nanoseconds: the coarsest times of files on the usual file systems
_SMALL = 1 << 20  # bytes
_FIRST = 1 << 24  # bytes of a text that are searched


def record(spec: Spec, built: Built) -> _inputs.Manifest:
    """Return what a finished build depends on beyond its request, for its manifest.

    Raises:
        BuildError: it depends on something that cannot be tracked.
    """
    return {**of_machine(spec), **of_files(spec, built.library.parent, built.place)}


def of_machine(spec: Spec) -> _inputs.Manifest:
    """Describe the compilers of a build, and where its result can run."""
    tools = _compilers.tools(spec.uses_cuda).items()
    architectures: tuple[str, ...] = ()
    if spec.uses_cuda:
        from ops.jit._compile import _gpu_archs

        architectures = _gpu_archs.architectures_of(spec)
    return {
        "compilers": {
            name: {"version": _compilers.version(tool), "identity": _compilers.identity(tool)}
            for name, tool in tools
            if tool is not None
        },
        "libc": _inputs.libc(),
        "architectures": architectures,
    }


def of_files(spec: Spec, folder: Path, place: Path, linked: bool = True) -> _inputs.Manifest:
    """Describe the files that a build has read, and those that could hide them.

    Args:
        spec: of the extension.
        folder: of the build; holds the tools' reports.
        place: another path of the folder, by which the tools know it.
        linked: whether anything was linked.
    """
    search = _reports.searched(spec, folder)
    headers = _reports.headers(spec, folder, place)
    archives = _reports.linked(spec, folder, place) if linked else []
    words = _flags.words((*spec.extra_cflags, *spec.extra_cuda_cflags))
    fixed = _fixed(spec, search, words)
    own = [path for path in headers if not _is_below(path, fixed)]
    texts = _texts(spec, own, words)
    tracked = [*own, *archives, *_read_by_assembly(spec, texts, search)]
    return {
        "inputs": sorted(_state(spec, path) for path in dict.fromkeys(tracked)),
        **_searched(spec, search, headers, own, archives, texts, fixed),
        "place": spec_place(spec) if any(map(_PLACE.search, texts)) else None,
    }


def spec_place(spec: Spec) -> list[str]:
    """List the folders that ``__FILE__`` may name."""
    return [str(root) for root in spec.header_roots]


def _fixed(spec: Spec, search: list[str], words: Iterable[str]) -> list[str]:
    """List the folders whose content the versions of torch, Python, CUDA and compilers fix."""
    home = _compilers.cuda_home() if spec.uses_cuda else None
    places = [os.path.dirname(torch.__file__), sysconfig.get_path("include")]
    if home and str(home) not in ("/", "/usr", "/usr/local"):
        places.append(str(home))
    variables = (os.environ.get(name, "") for name in _compilers.HEADER_VARIABLES)
    given = " ".join((*words, *_compilers.words_in("CXX"), *variables, *spec_place(spec)))
    places += [one for one in search if _COMPILERS_OWN.search(one) and one not in given]
    return list(dict.fromkeys([*places, *map(os.path.realpath, places)]))


def _is_below(path: str, folders: Iterable[str]) -> bool:
    tops = tuple(f"{folder}/" for folder in folders)
    if f"{path}/".startswith(tops):
        return True
    parent, name = os.path.split(path)
    return f"{os.path.realpath(parent)}/{name}/".startswith(tops)


def _state(spec: Spec, path: str) -> list[Any]:
    """Describe a file: where it is, its digest, and for most the size and times that stand for it.

    Small files of the extension itself are read at each look-up. An edit of a recent file may leave
    the same times.
    """
    described: list[Any] = [*_inputs.locate(spec, path), _inputs.digest_of(path)]
    try:
        status = os.stat(path)
    except OSError:
        return described
    own = described[0] >= 0 and status.st_size < _SMALL
    recent = time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) < _RECENT
    times = [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    return described if own or recent else [*described, *times]


# ---- texts ---------------------------------------------------------------------------------------


def _texts(spec: Spec, headers: list[str], words: Iterable[str]) -> list[bytes]:
    """Return the texts of the extension, what flags define included, with lines joined."""
    texts = [text.encode() for text in (*spec.cpp_sources, *spec.cuda_sources)]
    texts += [_read(path) for path in (*map(str, spec.sources), *headers)]
    defined = (f"#define {word.removeprefix('-D')}" for word in words)
    texts.append("\n".join(defined).encode(errors="surrogateescape"))
    return [text.replace(b"\r\n", b"\n").replace(b"\\\n", b"") for text in texts]


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(_FIRST)
    except OSError:
        return b""  # it has just gone, which its digest tells


def _read_by_assembly(spec: Spec, texts: list[bytes], search: list[str]) -> list[str]:
    found: list[str] = []
    folders = [*search, *spec_place(spec)]
    assembly = any(re.search(rb"\basm\b|__asm|\.section|\.globl", text) for text in texts)
    for text in texts if assembly else ():
        for literal in _ASSEMBLY_READS.findall(text):
            name = os.fsdecode(literal)
            there = [path for f in folders if os.path.isfile(path := os.path.join(f, name))]
            if not there:
                raise BuildError(
                    f"{spec.name}: .incbin and .include of the assembler must name their file by a "
                    f'literal, absolute path, as in .incbin "/data/table.bin", because nobody '
                    f"could tell when another one changes, got {name or 'a computed name'!r}"
                )
            found += there
    return found


def _asked(text: bytes) -> tuple[set[str], bool]:
    """Return the headers that a text asks for (``__has_include``), and whether it computes one."""
    if b"__has_" not in text:
        return set(), False
    found = [os.fsdecode(a or b) for a, b in _HAS_INCLUDE.findall(_GUARD.sub(b"", text))]
    return set(found) - {""}, "" in found


# ---- what could hide a header --------------------------------------------------------------------


def _searched(
    spec: Spec,
    search: list[str],
    headers: list[str],
    own: list[str],
    linked: list[str],
    texts: list[bytes],
    fixed: list[str],
) -> dict[str, Any]:
    """Describe what the folders searched have of the names that were, or could be, found there."""
    asked: set[str] = set()
    computed = False
    for text in texts:
        names, computes = _asked(text)
        asked, computed = asked | names, computed or computes
    if computed:
        defined = {os.fsdecode(a or b) for text in texts for a, b in _DEFINED.findall(text)}
        if not defined:
            raise BuildError(
                f"{spec.name}: __has_include must name a header, or a macro that is defined as the "
                f"name of one, because nobody could tell when another header comes"
            )
        asked |= defined
    for path in set(headers) - set(own):
        asked |= _asked(_read(path))[0]
    folders, libraries = _flags.library_names(spec.extra_ldflags)
    folders += [one for one in os.environ.get("LIBRARY_PATH", "").split(":") if os.path.isabs(one)]
    roots = spec_place(spec)
    beside = [os.path.dirname(path) for path in own if not path.startswith(_inputs.SYSTEM)]
    places = dict.fromkeys([*roots, *search, *beside, *folders, *map(os.path.dirname, linked)])
    places = {one: None for one in places if not _is_below(one, fixed)}
    shadows = [one for one in places if not f"{one}/".startswith(_inputs.SYSTEM)]
    names = {*asked, *libraries, *_names(headers, [*search, *roots])}
    parts = _pruned(names, shadows)
    # In the system's own folders, which have too many files, and beyond "..", which no listing has.
    exact = sorted({*asked, *libraries, *(name for name in names if ".." in name)})
    return {
        "names": parts,
        "exact": exact,
        "searched": [
            [*_inputs.locate(spec, one), one in shadows,
             _inputs.listing(one, one in shadows, parts, exact)]
            for one in places
        ],
    }  # fmt: skip


def _names(headers: list[str], search: list[str]) -> set[str]:
    """Return the names by which headers may be included: their paths below a folder searched."""
    tops = sorted((f"{one}/" for one in search), key=len)
    found = set()
    for path in headers:
        top = next((one for one in tops if path.startswith(one)), f"{os.path.dirname(path)}/")
        found.add(path[len(top) :])
    return found


def _pruned(names: Iterable[str], shadows: list[str]) -> list[str]:
    """Return the parts of names that can tell whether a new file hides another.

    Below a folder that none of the shadows has, nothing can be hidden before the folder comes.
    """
    parts: set[str] = set()
    for name in names:
        first, *more = [part for part in name.split("/") if part] or [""]
        parts.add(first)
        if more and any(os.path.isdir(os.path.join(one, first)) for one in shadows):
            parts.update(more)
    return sorted(parts)
