"""Text that pages of the site take from elsewhere, so that it stands in one place.

A line ``<!-- generated: NAME ARGUMENTS -->`` is replaced by Markdown: a file of the repository,
source files, the reference of an op from its docstrings, the public names, the help of the command.
Links that leave ``docs/`` lead to the pages that hold those files.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from ops._cli import main as cli

DOCS = Path(__file__).resolve().parent.parent
ROOT = DOCS.parent

# Files outside docs/, and the pages that show them.
PAGES = {
    "README.md": "docs/index.md",
    "CHANGELOG.md": "docs/changelog.md",
    "CONTRIBUTING.md": "docs/contributing.md",
    "benchmarks/README.md": "docs/speed.md",
}


def public_names() -> dict[str, str]:
    """The full name of everything public in ``ops``, and the module that defines it."""
    tree = ast.parse((ROOT / "ops" / "__init__.pyi").read_text())
    return {
        f"ops.{alias.asname}": f"ops.{node.module}"
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }


def op_names() -> list[str]:
    """The ops: one for each public module of the rooms of ops, losses first."""
    modules = dict.fromkeys(public_names().values())
    return [
        module.removeprefix(room)
        for room in ("ops.losses.", "ops.layers.", "ops.arrays.")
        for module in modules
        if module.startswith(room)
    ]


# ---- the generated texts -------------------------------------------------------------------------


def file(name: str) -> str:
    """A file of the repository, with its links as seen from ``docs/``."""
    return _links((ROOT / name).read_text(), ROOT / name, DOCS)


LANGUAGES = {".cpp": "cpp", ".cu": "cpp", ".h": "cpp", ".md": "markdown", ".py": "python"}


def sources(folder: str) -> str:
    """The files below a folder of the repository as they are, each under its path from there."""
    paths = [path for path in sorted((ROOT / folder).rglob("*.*")) if path.suffix in LANGUAGES]
    return "\n\n".join(
        f"`{path.relative_to(ROOT / folder)}`:\n\n"
        f"````{LANGUAGES[path.suffix]}\n{path.read_text()}````"
        for path in paths
    )


def reference(module: str) -> str:
    """Everything public that a module defines, functions first."""
    names = [name for name, where in public_names().items() if where.endswith(f".{module}")]
    if not names:
        raise ValueError(f"no public name of ops comes from a module {module}")
    return "\n\n".join(_described(name) for name in sorted(names, key=_order))


def _object(name: str) -> object:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def _order(name: str) -> tuple[bool, bool]:
    value = _object(name)
    return not inspect.isfunction(value), not _is_module(value)


def _is_module(value: object) -> bool:
    return inspect.isclass(value) and issubclass(value, torch.nn.Module)


def _described(name: str) -> str:
    value = _object(name)
    if not inspect.isclass(value):
        return _rst(f".. autofunction:: {name}")
    if issubclass(value, BaseException):
        return _rst(f".. autoexception:: {name}")
    options = []
    if _is_module(value):
        options = ["   :members: forward"] if value.__name__ == name.rpartition(".")[2] else []
    elif not issubclass(value, (torch.autograd.Function, tuple)):
        options = ["   :members:"]
    return _rst(f".. autoclass:: {name}", *options)


def _rst(*lines: str) -> str:
    return "\n".join(["```{eval-rst}", *lines, "```"])


def described(*names: str) -> str:
    """The named objects, from their docstrings."""
    return "\n\n".join(map(_described, names))


def errors() -> str:
    """Every public exception and warning."""
    values = {name: _object(name) for name in public_names()}
    kinds = [
        name
        for name, value in values.items()
        if inspect.isclass(value) and issubclass(value, BaseException)
    ]
    return "\n\n".join(_described(name) for name in kinds)


def names() -> str:
    """A table of the public names of ``ops``, each with the first line of its docstring."""
    rows = ["| name | |", "|---|---|"]
    for name in sorted(public_names(), key=str.lower):
        value = _object(name)
        if not inspect.ismodule(value):
            first = (inspect.getdoc(value) or "").partition("\n\n")[0]
            rows.append(f"| {{py:obj}}`{name}` | {_markdown(first)} |")
    return "\n".join(rows)


def _markdown(docstring: str) -> str:
    """The roles and literals of a docstring's paragraph, in Markdown."""
    text = " ".join(docstring.split()).replace("|", "\\|")
    text = re.sub(r"``([^`]+)``", r"`\1`", text)
    text = re.sub(r":math:`([^`]+)`", r"{math}`\1`", text)
    return re.sub(r":[a-z:]+:`~?([^`]+)`", r"`\1`", text)


def ops_pages() -> str:
    """The table of contents of the pages of ops, losses first."""
    pages = [f"ops/{op}" for op in op_names()]
    return "\n".join(["```{toctree}", ":hidden:", ":caption: Ops", "", *pages, "```"])


def command_line() -> str:
    """The help of the command ``jitops`` and of each of its subcommands."""
    return "\n".join(_helps(cli._parser(), 2))


def _helps(parser: argparse.ArgumentParser, level: int) -> Iterator[str]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                inner.formatter_class = _Wide
                yield f"{'#' * level} {inner.prog}\n"
                nested = any(isinstance(one, argparse._SubParsersAction) for one in inner._actions)
                if not nested:
                    yield f"```text\n{inner.format_help().strip()}\n```\n"
                else:
                    helps = {one.dest: one.help for one in action._choices_actions}
                    yield f"{helps[name]}.\n".capitalize()
                yield from _helps(inner, level + 1)


class _Wide(argparse.HelpFormatter):
    """Help as in a terminal of 88 columns, whatever terminal builds the site."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=88)


GENERATORS: dict[str, Callable[..., str]] = {
    "file": file,
    "sources": sources,
    "reference": reference,
    "described": described,
    "errors": errors,
    "names": names,
    "ops": ops_pages,
    "command-line": command_line,
}


# ---- pages ---------------------------------------------------------------------------------------


def complete(text: str, page: Path) -> tuple[str, list[Path]]:
    """A page's text with everything that is generated, and the files that it was made from."""
    files: list[Path] = []

    def generate(found: re.Match[str]) -> str:
        generator, *arguments = found[1].split()
        if generator == "file":
            files.append(ROOT / arguments[0])
        return GENERATORS[generator](*arguments)

    text = _links(text, page, page.parent)
    return re.sub(r"^<!-- generated: (.+) -->$", generate, text, flags=re.MULTILINE), files


def _links(text: str, origin: Path, folder: Path) -> str:
    """``text`` of the file ``origin``, with its links as seen from ``folder``."""

    def moved(address: str) -> str:
        target = Path(os.path.normpath(origin.parent / address))
        if target.is_relative_to(ROOT):
            target = ROOT / PAGES.get(str(target.relative_to(ROOT)), target)
        return os.path.relpath(target, folder)

    def link(found: re.Match[str]) -> str:
        shown, address, anchor = found.groups()
        if (origin.parent / address).is_dir():
            return shown  # a site has no page for a folder
        return f"[{shown}]({moved(address)}{anchor or ''})"

    text = re.sub(r"\[([^\]\n]*(?:\n[^\]\n]*)?)\]\((?!\w+:|#)([^)#\s]+)(#[^)]*)?\)", link, text)
    return re.sub(r'(?<=<img src=")(?!\w+:)[^"]+', lambda found: moved(found[0]), text)
