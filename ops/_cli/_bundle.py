"""``jitops bundle``: take built extensions to a machine that cannot build them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ops._cli import _build
from ops._errors import BundleError
from ops.jit import _admin


def add_to(commands: Any) -> None:
    """Add the parsers of the command."""
    parser = commands.add_parser("bundle", help="export and import built extensions as one archive")
    actions = parser.add_subparsers(title="actions", required=True, metavar="ACTION")
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
    items = [item for root in _admin.readable_roots() for item in _admin.items(root)]
    for name in options.names:
        found = [item.entry for item in items if item.name == name]
        if not found:
            raise BundleError(f"the cache has no entry named {name!r}: build it first")
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
