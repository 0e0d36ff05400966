"""Records the dependencies of a finished build: files by content, folders by hiding names.

The tools report what they read and where they search. Nothing is inferred from flags. A file that
no tool can report is refused. Headers of torch, Python, CUDA and the compiler itself are left out,
because their versions, which are compared too, tell when they change.
"""

import itertools
import os
import re
import sys
import sysconfig
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from ops._errors import BuildError
from ops.jit import _flags, _inputs
from ops.jit._compile import _compilers, _gpu_archs
from ops.jit._compile._build import LINK_REPORT
from ops.jit._spec import RETIRE, Spec

_WORD = re.compile(r"(?:\\[ \t#]|[^ \t])+")
_SEARCHED = re.compile(r"^ (\S.*)$", re.MULTILINE)
_IGNORED = re.compile(r'^ignoring (?:nonexistent|duplicate) directory "(.+)"$', re.MULTILINE)
_LITERAL = rb"(?:\"([^\"\n]+)\"|<([^<>\n]+)>)"
_BLANK = rb"(?:\s|/\*.*?\*/)*"
# A header, or a macro, in which case each literal of a directive may be the header.
_HAS_INCLUDE = re.compile(
    rb"\b__has_(?:include(?:_next)?|embed)%b\(%b(?:%b|(\w+)%b\))?"
    % (_BLANK, _BLANK, _LITERAL, _BLANK)
)
_ALIAS = re.compile(rb"#\s*define\s+\w+\s+__has_(?:include|embed)")
_DIRECTIVE = re.compile(rb"^[ \t]*#[ \t]*(?:define|if|elif)\b.*", re.MULTILINE)
# Assembly reads files that no tool reports. It may stand in any text; no call does: "x.include(y)".
_ASSEMBLY_READS = re.compile(
    rb"(?<!\.)(?i:\.(?:incbin|(include)))\b(?![ \t]*[(=;,)])[ \t]*(?:\\*\"([^\"\\\n]+)\\*\")?"
)
_INCLUDED = re.compile(rb"^[ \t]*#[ \t]*(?:include|import)\s*" + _LITERAL, re.MULTILINE)
_PLACE = re.compile(rb"__FILE__|__BASE_FILE__|__builtin_FILE\b|\bsource_location\b")
_NOTHING = re.compile(r"(?<![^/])\./+|(?<=/)/+")  # in a path: it leads nowhere else without it
_COMPILERS_OWN = re.compile(r"/(?:lib/gcc|lib/clang|lib/llvm|include/c\+\+|include/[\w-]+/c\+\+)")
_TEMPORARY = re.compile(r"\.ltrans\d*\.ltrans\.o$")  # objects of link-time optimisation
_SHARED = re.compile(rb"\x7fELF.{12}\x03", re.DOTALL)  # the head of a shared library
_FOR_LIBRARIES = ("LIBRARY_PATH", "LD_RUN_PATH")
_RECENT = 2_000_000_000  # nanoseconds: the coarsest times of files on the usual file systems
_SMALL = 1 << 20  # bytes
_FIRST = 1 << 24  # bytes of a text that are searched


def record(spec: Spec, folder: Path) -> _inputs.Manifest:
    """Return the dependencies of the build in ``folder`` beyond its request, for its manifest."""
    search = _search_list(spec, folder)
    headers = _headers(spec, folder)
    archives = _linked(spec, folder)
    words = _flags.words((*spec.extra_cflags, *spec.extra_cuda_cflags))
    fixed = _fixed(spec, search, words)
    own = [path for path in headers if not _is_below(path, fixed)]
    text = _text(spec, own, words)
    precompiled = _precompiled(_text(spec, [], words), words)
    roots = [str(root) for root in spec.header_roots]
    beside = [os.path.dirname(path) for path in own if not path.startswith(_inputs.SYSTEM)]
    tracked = [*own, *archives, *_read_by_assembly(spec, text)]
    tracked += _files_in([*search, *roots, *beside], precompiled)
    # Where a new file may hide one that was read.
    folders, libraries = _flags.library_names(spec.extra_ldflags)
    folders += [one for one in os.environ.get("LIBRARY_PATH", "").split(":") if os.path.isabs(one)]
    places = dict.fromkeys([*roots, *search, *beside, *folders, *map(os.path.dirname, archives)])
    places = {one: None for one in places if not _is_below(one, fixed)}
    # Most folders of the system have too many files. This one has few, and is searched early.
    beyond = [one for one in places if not f"{one}/".startswith(_inputs.SYSTEM)]
    shadows = [*beyond, *({"/usr/local/include"} & places.keys())]
    # Beneath a name that no shadow has, nothing is hidden before that name comes.
    present = {name for one in shadows for name in _inputs.names_in(one)}
    names = {*precompiled, *_names([*headers, *map(str, spec.sources)], [*search, *roots])}
    exact = {*_asked(spec, text, set(headers) - set(own)), *libraries}
    exact |= {name for name in names if ".." in name or name.startswith("/")}
    firsts = {name: name.partition("/")[0] for name in names}
    names = {name if first in present else first for name, first in firsts.items()}
    return {
        **_machine(spec),
        "inputs": sorted(_state(spec, path) for path in dict.fromkeys(tracked)),
        "names": sorted(names),
        "exact": sorted(exact),
        "searched": [
            [*_inputs.locate(spec, one), one in shadows,
             _inputs.listing(one, one in shadows, sorted(names), sorted(exact))]
            for one in places
        ],
        "place": roots if _is_bound(spec, text) else None,
    }  # fmt: skip


def _machine(spec: Spec) -> _inputs.Manifest:
    """Describe the compilers of a build, and where its result can run."""
    return {
        "compilers": {
            name: {"version": _compilers.version(tool), "identity": _compilers.identity(tool)}
            for name, tool in _compilers.tools(spec.uses_cuda).items()
            if tool is not None
        },
        "libc": _inputs.libc(),
        "architectures": _gpu_archs.architectures_of(spec),
    }


def _fixed(spec: Spec, search: list[str], words: Iterable[str]) -> list[str]:
    """List the folders whose content the versions of torch, Python, CUDA and compilers fix."""
    home = _compilers.cuda_home() if spec.uses_cuda else None
    # Other packages have folders of their own there.
    pythons = Path(sysconfig.get_path("include")).glob("*")
    its = [str(one) for one in pythons if one.name in ("cpython", "internal") or one.is_file()]
    places = [os.path.dirname(torch.__file__), *its]
    if home and str(home) not in ("/", "/usr", "/usr/local"):
        places.append(str(home))
    variables = (os.environ.get(name, "") for name in _compilers.HEADER_VARIABLES)
    roots = map(str, spec.header_roots)
    given = " ".join((*words, *_compilers.words_in("CXX"), *variables, *roots))
    places += [one for one in search if _COMPILERS_OWN.search(one) and one not in given]
    return list(dict.fromkeys([*places, *map(os.path.realpath, places)]))


def _is_below(path: str, folders: Iterable[str]) -> bool:
    tops = tuple(f"{folder}/" for folder in folders)
    parent, name = os.path.split(path)
    return f"{path}/".startswith(tops) or f"{os.path.realpath(parent)}/{name}/".startswith(tops)


def _state(spec: Spec, path: str) -> list[Any]:
    """Describe a file: where it is, its digest, and for most the size and times that stand for it.

    Small files of the extension itself are read at each look-up. An edit of a recent file may leave
    the same times.
    """
    number, name = _inputs.locate(spec, path)
    times = _inputs.times(path)
    own = number >= 0 and (not times or times[0] < _SMALL)
    recent = time.time_ns() - max(times[1:3], default=0) < _RECENT
    return [number, name, _inputs.digest_of(path), *([] if own or recent else times)]


def _search_list(spec: Spec, folder: Path) -> list[str]:
    """List the folders in which the compilers of a build search for headers."""
    found: list[str] = []
    for path in sorted(folder.glob("search*.txt")):
        text = os.fsdecode(path.read_bytes())
        end = text.find("End of search list")
        if end < 0:
            raise BuildError(
                f"{spec.name}: the compiler does not say where it searches for headers (-E -v), so "
                f"that nobody could tell when a new one hides another: {text[-300:]}"
            )
        found += _IGNORED.findall(text[:end])
        found += _SEARCHED.findall(text[text.find("search starts here") : end])
    found = [_NOTHING.sub("", name) for name in found if os.path.isabs(name)]
    return list(dict.fromkeys(found))


def _headers(spec: Spec, folder: Path) -> list[str]:
    """List the headers that the compilers of the build in ``folder`` opened."""
    found: list[str] = []
    # Nothing can be included in these.
    unreported = [f"{RETIRE}.o", *(f"{one.stem}.o" for one in spec.sources if one.suffix == ".s")]
    for built in folder.glob("*.o"):
        by_nvcc = built.name.endswith(".cuda.o")
        text = "" if built.name in unreported else _report(spec, folder, f"{built.name}.d", "-MF")
        for line in text.replace("\\\n", " ").split("\n"):
            for word in _WORD.findall(re.split(r":(?:[ \t]|$)", line, maxsplit=1)[-1]):
                path = word.replace("\\ ", " ") if by_nvcc else _unescaped(word)
                # nvcc lists the names in #line too, which are no files.
                if not by_nvcc or os.path.isfile(folder / path):
                    found.append(path)
    return _tracked(spec, found, folder)


def _linked(spec: Spec, folder: Path) -> list[str]:
    """List the files that the linker opened and that become part of the result."""
    if sys.platform == "darwin":  # whose linker reports nothing
        return _files_in(*_flags.library_names(spec.extra_ldflags))
    rule = _report(spec, folder, LINK_REPORT, "--dependency-file").partition("\n\n")[0]
    words = [line.strip().removesuffix("\\").rstrip() for line in rule.split("\n")[1:]]
    # GNU ld escapes nothing, lld does.
    names = [word if os.path.exists(folder / word) else _unescaped(word) for word in words]
    names = [name for name in names if not _TEMPORARY.search(name)]
    linked = {path: _read(path, 18) for path in _tracked(spec, names, folder)}
    if thin := [path for path, head in linked.items() if head.startswith(b"!<thin>")]:
        raise BuildError(
            f"{spec.name}: {thin[0]} is a thin archive, which names objects that may change "
            f"unseen: make an archive that holds them (ar without T)"
        )
    return [path for path, head in linked.items() if not _SHARED.match(head)]


def _report(spec: Spec, folder: Path, name: str, option: str) -> str:
    try:
        return os.fsdecode((folder / name).read_bytes())
    except FileNotFoundError:
        raise BuildError(
            f"{spec.name}: the compiler or linker did not say in {name} which files it read: flags "
            f"must not have the list written elsewhere ({option})"
        ) from None


def _unescaped(word: str) -> str:
    word = re.sub(r"(\\*)\\([ \t])", lambda m: m[1][len(m[1]) // 2 :] + m[2], word)
    return word.replace("\\#", "#").replace("$$", "$")


def _tracked(spec: Spec, paths: Iterable[str], folder: Path) -> list[str]:
    """Drop sources and the build's own files; refuse names that lead nowhere."""
    sources = set(map(str, spec.sources))
    inner = f"{os.path.realpath(folder)}/"
    found: dict[str, None] = {}
    for path in filter(None, paths):
        whole = _NOTHING.sub("", os.path.join(folder, path))
        if not os.path.isfile(whole):
            raise BuildError(
                f"{spec.name}: a file that the build read cannot be tracked, because the compiler "
                f"or linker reports it as {path!r}: name it by an absolute path of ordinary "
                f"characters"
            )
        parent = os.path.realpath(os.path.dirname(whole))
        if not f"{parent}/".startswith(inner) and whole not in sources:
            found[whole] = None
    return list(found)


def _text(spec: Spec, headers: list[str], words: Iterable[str]) -> bytes:
    """Return all text of the extension, and macros in its flags, with lines joined."""
    texts = [text.encode() for text in (*spec.cpp_sources, *spec.cuda_sources)]
    texts += [_read(path) for path in (*map(str, spec.sources), *headers)]
    texts += [os.fsencode(f"#define {word.removeprefix('-D')}") for word in words]
    return b"\n".join(texts).replace(b"\r\n", b"\n").replace(b"\\\n", b"")


def _read(path: str, first: int = _FIRST) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(first)
    except OSError:
        return b""  # it has just gone, which its digest tells


def _files_in(folders: Iterable[str], names: Iterable[str]) -> list[str]:
    paths = (os.path.join(folder, name) for name in names for folder in folders)
    return [path for path in paths if os.path.isfile(path)]


def _named(pattern: re.Pattern[bytes], text: bytes) -> list[str]:
    """List the literals after a pattern; empty for one that is no literal."""
    return [os.fsdecode(quoted or angle) for quoted, angle, *_ in pattern.findall(text)]


def _precompiled(text: bytes, words: Sequence[str]) -> list[str]:
    """List the precompiled headers that g++ would take in the place of headers, and not report.

    It takes none for an include within a header.
    """
    forced = [after for word, after in itertools.pairwise(words) if word.endswith("-include")]
    return [f"{_NOTHING.sub('', name)}.gch" for name in (*forced, *_named(_INCLUDED, text))]


def _is_bound(spec: Spec, text: bytes) -> bool:
    """Whether the sources may be compiled otherwise elsewhere: they know, or name, their place."""
    variables = (*_compilers.HEADER_VARIABLES, *_FOR_LIBRARIES)
    named = [*_flags.words(spec.extra_ldflags), *_compilers.words_in("CXX")]
    text += os.fsencode("\n".join([*named, *(os.environ.get(one, "") for one in variables)]))
    return bool(_PLACE.search(text)) or any(os.fsencode(one) in text for one in spec.header_roots)


def _read_by_assembly(spec: Spec, text: bytes) -> list[str]:
    reads = _ASSEMBLY_READS.findall(text)
    for is_include, name in reads:
        if is_include or not os.path.isabs(name) or not os.path.isfile(name):
            raise BuildError(
                f"{spec.name}: assembly must read no file by .include, and one by .incbin by its "
                f'literal, absolute path, as in .incbin "/data/table.bin", because nobody could '
                f"tell when another one changes, got {os.fsdecode(name) or 'a computed name'!r}"
            )
    return [os.fsdecode(name) for _, name in reads]


def _asked(spec: Spec, text: bytes, others: Iterable[str]) -> set[str]:
    """List the headers that text, or other headers, ask for by ``__has_include``."""
    directives = b"\n".join(_DIRECTIVE.findall(text))
    if any(not any(found) for found in _HAS_INCLUDE.findall(directives)):
        raise BuildError(
            f"{spec.name}: __has_include must name a header, or a macro that is defined as the "
            f"name of one, because nobody could tell when another header comes"
        )
    asked = _named(_HAS_INCLUDE, text)
    if "" in asked or _ALIAS.search(text):
        asked += _named(re.compile(_LITERAL), directives)
    for path in others:
        asked += _named(_HAS_INCLUDE, _read(path))
    return {*asked} - {""}


def _names(headers: list[str], search: list[str]) -> set[str]:
    """Return the names by which headers may be included: their paths below folders searched."""
    tops = [f"{one}/" for one in search]
    its = {path.removeprefix(top) for path in headers for top in tops if path.startswith(top)}
    return its | {os.path.basename(path) for path in headers if not path.startswith(tuple(tops))}
