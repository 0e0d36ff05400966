"""``jitops bundle``: take built extensions to a machine that cannot build them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ops._cli import _build, _names
from ops._errors import BundleError
from ops.jit import _admin


def add_to(commands: Any) -> None:
    """Add the parsers of the command."""
    parser = commands.add_parser("bundle", help="export and import built extensions as one archive")
    actions = _build.add_actions(parser, "actions", "ACTION")
    export = actions.add_parser(
        "export",
        help="write ops and other extensions to an archive",
        description="Build the selected ops if needed, and write them and your named extensions to "
        "an archive. JITOPS_BUNDLE=FILE uses an archive in place.",
    )
    export.add_argument("file", type=Path, metavar="FILE")
    _build.add_selection(export)
    export.add_argument(
        "--extension",
        dest="names",
        action="append",
        default=[],
        metavar="NAME",
        help="one of your extensions in the cache; without OP, no op is exported then",
    )
    export.set_defaults(run=_export)
    for name, run, help in (
        ("import", _import, "copy the extensions of an archive into the cache"),
        ("verify", _verify, "check an archive against its checksums"),
    ):
        action = actions.add_parser(name, help=help, description=f"{help.capitalize()}.")
        action.add_argument("file", type=Path, metavar="FILE")
        action.set_defaults(run=run)


def _export(options: argparse.Namespace) -> None:
    entries = []
    if options.ops or not options.names:
        entries += [extension.build_entry() for extension in _build.selected(options)]
    for name in options.names:
        found = [item.entry for item in _names.items() if item.name == name]
        if not found:
            raise BundleError(f"the cache has no entry named {name!r}: build it first")
        entries += found
    entries = list({entry.folder: entry for entry in entries}.values())
    for entry in entries:
        if problem := _admin.entries.problem(entry):
            raise BundleError(f"{entry.folder} cannot be exported: {problem}")
    _admin.bundle.export(options.file.absolute(), entries)
    told = sorted(f"  {one.manifest['name']} for {_names.target(one)}" for one in entries)
    print("\n".join([f"{options.file}: {_names.entries(len(told))}", *told]))


def _import(options: argparse.Namespace) -> None:
    new = _admin.bundle.import_into(options.file.absolute(), _admin.location.writable_root())
    print("\n".join([*map(str, new), _names.entries(len(new), "new ")]))


def _verify(options: argparse.Namespace) -> int:
    count, wrong = _admin.bundle.verify(options.file.absolute())
    print("\n".join([*wrong, f"{_names.entries(count)} checked, {len(wrong)} damaged"]))
    return 1 if wrong else 0
