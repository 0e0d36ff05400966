"""``jitops bundle``: take what is built to a machine that cannot build."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ops._cli import _build
from ops._errors import BundleError
from ops.jit import _admin


def add_to(commands: Any) -> None:
    """Its parsers."""
    parser = commands.add_parser("bundle", help="export and import what is built, as one archive")
    actions = parser.add_subparsers(title="actions", required=True, metavar="ACTION")
    export = actions.add_parser(
        "export",
        help="write ops and other extensions to an archive",
        description="Build the ops that are selected if need be, and write them to an archive, "
        "with the extensions of yours that are named. JITOPS_BUNDLE=FILE uses one in place.",
    )
    export.add_argument("file", type=Path, metavar="FILE")
    _build.add_selection(export)
    export.add_argument(
        "--extension",
        dest="names",
        action="append",
        default=[],
        metavar="NAME",
        help="an extension of yours in the cache; ops are then those named only",
    )
    export.set_defaults(run=_export)
    for name, run, help in (
        ("import", _import, "put an archive into the cache"),
        ("verify", _verify, "check an archive against its checksums"),
    ):
        action = actions.add_parser(name, help=help, description=f"{help.capitalize()}.")
        action.add_argument("file", type=Path, metavar="FILE")
        action.set_defaults(run=run)


def _export(options: argparse.Namespace) -> None:
    entries = []
    if options.ops or not options.names:
        entries += [extension.build_entry() for extension in _build.selected(options)]
    items = [item for root in _admin.readable_roots() for item in _admin.items(root)]
    for name in options.names:
        found = [item.entry for item in items if item.name == name]
        if not found:
            raise BundleError(f"nothing in the cache is called {name!r}: build it first")
        entries += found
    entries = list({entry.folder: entry for entry in entries}.values())
    _admin.export(options.file.absolute(), entries)
    print(f"{options.file}: {', '.join(sorted(str(one.manifest['name']) for one in entries))}")


def _import(options: argparse.Namespace) -> None:
    new = _admin.import_into(options.file.absolute(), _admin.writable_root())
    print("\n".join([*map(str, new), f"{len(new)} new entries"]))


def _verify(options: argparse.Namespace) -> int:
    count, wrong = _admin.verify_bundle(options.file.absolute())
    print("\n".join([*wrong, f"{count - len(wrong)} of {count} entries are whole"]))
    return 1 if wrong else 0
