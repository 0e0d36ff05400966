"""What flags say: their words, and the folders and files that they name."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from ops.jit import _linked, _shell

# Options whose value may be the next word. Longer ones first where one begins with another.
_PREFIX, _PREFIXED = "-iprefix", ("-iwithprefixbefore", "-iwithprefix")
_FOLDERS = ("-isystem", "-iquote", "-idirafter", "-cxx-isystem", *_PREFIXED, "-I")
_INCLUDED = ("-include-pch", "-include", "-imacros")
_JOINED = (*_FOLDERS, _PREFIX, *_INCLUDED, "-L", "-l", "-T", "-R", "-D")
_LONG_FOLDERS = {
    "include-directory": "-I",
    "include-directory-after": "-I",
    "system-include": "-isystem",
    "include-prefix": _PREFIX,
    "include-with-prefix": "-iwithprefix",
    "include-with-prefix-after": "-iwithprefix",
    "include-with-prefix-before": "-iwithprefixbefore",
}
_LONG_FILES = ("include", "pre-include", "imacros")
_SCRIPTS = (
    *("script", "default-script", "version-script", "dynamic-list", "retain-symbols-file"),
    *("just-symbols", "symbol-ordering-file", "section-ordering-file", "mri-script"),
    *("export-dynamic-symbol-list", "remap-inputs-file"),
)
_SHORT = {"library-path": "-L", "library-directory": "-L", "library": "-l", **_LONG_FOLDERS}
_RESPONSES = ("options-file", "optf")
# Options that are given their value behind "=" only, and read a file.
_FILES = (
    *("specs", "fplugin", "fprofile-use", "fprofile-instr-use", "fprofile-sample-use"),
    *("fauto-profile", "fsanitize-ignorelist", "fsanitize-blacklist", "fmodule-file"),
)
# Options whose next word is a file that is written, or a mere name.
_WRITTEN = (
    *("o", "output", "output-file", "Map", "MF", "MT", "MQ", "MJ", "aux-info", "dumpbase"),
    *("dependency-file", "dependency-output", "out-implib", "serialize-diagnostics", "soname"),
)
_WITH_VALUE = (*_LONG_FILES, *_SCRIPTS, *_RESPONSES, *_SHORT, *_WRITTEN, "specs")
_PASSES_ON = ("-Xlinker", "-Xpreprocessor", "-Xassembler", "-Xclang")
_PASSES_LIST_ON = ("-Xcompiler", "--compiler-options", "--linker-options")
_MOST = 10  # response files in response files
# Variables that lead to headers, and those with words of compilers in them.
LEAD_TO_HEADERS = ("CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH")
_COMMANDS = ("CXX", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")


def words(flags: Sequence[str]) -> list[str]:
    """The flags one by one, as the shell splits them; response files (``@file``) opened.

    An option and its value are one word: ``-I x`` as ``-Ix``, ``--script x`` as ``--script=x``, and
    ``--library-path x`` as ``-Lx``. What is passed on comes without its ``-Wl,`` and the like.
    """
    return _words(_shell.split(flags), 0)


def _words(said: Sequence[str], depth: int) -> list[str]:
    found: list[str] = []
    for part in _parts(said):
        last = found[-1] if found else ""
        if last in _JOINED:
            found[-1] += part
        elif _name(last) in _WITH_VALUE and last.startswith("-"):
            found[-1] += f"={part}"
        else:
            found.append(part)
    found = [_short(word) for word in found]
    return [inner for word in found for inner in (word, *_opened(word, depth))]


def _parts(said: Sequence[str]) -> Iterator[str]:
    listed = False
    for word in said:
        passed = re.match(r"-W[lpa],|(?:-Xcompiler|--compiler-options|--linker-options)=", word)
        if passed or listed:
            yield from word[passed.end() if passed else 0 :].split(",")
        elif word not in (*_PASSES_ON, *_PASSES_LIST_ON):
            yield word
        listed = word in _PASSES_LIST_ON


def _name(word: str) -> str:
    return word.lstrip("-")


def _short(word: str) -> str:
    name, _, value = _name(word).partition("=")
    return _SHORT[name] + value if name in _SHORT and word.startswith("-") else word


def _opened(word: str, depth: int) -> list[str]:
    file = _response(word)
    if file is None or depth == _MOST or not _is_file(file):
        return []
    try:
        text = file.read_text(errors="surrogateescape")
    except OSError:
        return []  # the compilers will say so
    return _words(_shell.in_response(text), depth + 1)


def _response(word: str) -> Path | None:
    if word.startswith("@"):
        return Path(word[1:])
    name, _, value = _name(word).partition("=")
    return Path(value) if value and name in _RESPONSES else None


def _is_file(path: Path) -> bool:
    return path.is_absolute() and os.path.isfile(path)  # the compilers run in a folder of their own


def folders(flags: Sequence[str]) -> list[Path]:
    """The folders of headers that flags name."""
    found, prefix = [], ""
    for word in words(flags):
        if word.startswith(_PREFIX):
            prefix = word[len(_PREFIX) :]
        option = next((one for one in _FOLDERS if word.startswith(one)), "")
        value = (prefix if option in _PREFIXED else "") + _without_root(word[len(option) :])
        if option and value.startswith("/"):
            found.append(Path(value))
    return found


def folders_of_environment() -> list[Path]:
    """The folders of headers that variables lead to."""
    named = ":".join(os.environ.get(name, "") for name in LEAD_TO_HEADERS).split(os.pathsep)
    commands = [os.environ.get(name, "") for name in _COMMANDS]
    return [*(Path(name) for name in named if name.startswith("/")), *folders(commands)]


def _without_root(folder: str) -> str:
    """A folder that is named below the root of the system, which is ``/`` here."""
    return folder.removeprefix("=").removeprefix("$SYSROOT")


def as_text(flags: Sequence[str]) -> str:
    """What flags define and include, as C++ text would."""
    lines = []
    for word in words(flags):
        name, _, value = _name(word).partition("=")
        option = next((one for one in _INCLUDED if word.startswith(one)), "")
        if word.startswith("-D"):
            lines.append(f"#define {name[1:]} {value}")
        elif option or (value and name in _LONG_FILES):
            lines.append(f'#include "{word[len(option) :] if option else value}"')
    return "".join(f"{line}\n" for line in lines)


def library_folders(flags: Sequence[str]) -> list[Path]:
    """The folders of libraries that flags name."""
    return _library_folders(words(flags))


def _library_folders(said: Sequence[str]) -> list[Path]:
    found = [_without_root(word[2:]) for word in said if word.startswith("-L")]
    return [Path(folder) for folder in found if folder]


def files(flags: Sequence[str]) -> list[Path]:
    """The files that flags name, or that these name, whose content becomes part of what is built.

    Not shared libraries, nor headers that an ``#include`` finds.
    """
    return [path for path in all_files(flags) if not _linked.is_shared(path)]


def all_files(flags: Sequence[str], searched: Sequence[Path] = ()) -> list[Path]:
    """The same, and the shared libraries.

    Args:
        searched: folders of libraries beside those that are named.
    """
    said = words(flags)
    linked = [*_library_folders(said), *folders_in("LIBRARY_PATH"), *searched]
    found: dict[Path, None] = {}
    left = [path for word in reversed(said) for path in reversed(_named(word, linked))]
    while left:
        path = left.pop()
        if path not in found and _is_file(path):
            found[path] = None
            left += reversed(_linked.named_by(path, linked))
    return list(found)


def folders_in(variable: str) -> list[Path]:
    """The folders that an environment variable lists; its empty places mean the current one."""
    return [Path(one) for one in filter(None, os.environ.get(variable, "").split(os.pathsep))]


def _named(word: str, linked: list[Path]) -> list[Path]:
    response = _response(word)
    if response is not None:
        return [response]
    name, _, value = _name(word).partition("=")
    if not word.startswith("-"):
        return [Path(word)]  # to be linked, by whatever name
    if value and name in (*_FILES, *_LONG_FILES):
        return [Path(value)]
    if value and name in _SCRIPTS:
        return [Path(value), *(folder / value for folder in linked)]
    for option in _INCLUDED:
        if word.startswith(option):
            return [Path(word[len(option) :])]
    if word.startswith("-l"):
        return _linked.libraries(word[2:], linked)
    if word.startswith(("-T", "-R")):
        return [Path(word[2:]), *(folder / word[2:] for folder in linked)]
    return []
