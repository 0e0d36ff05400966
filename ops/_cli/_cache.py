"""``jitops cache``: list, explain, verify and delete entries of the cache."""

from __future__ import annotations

import argparse
import json
import math
import time
from typing import Any

from ops import _config
from ops._cli import _build, _names
from ops._errors import ArgumentError
from ops.jit import Extension, _admin


def add_to(commands: Any) -> None:
    """Add the parsers of the command."""
    parser = commands.add_parser("cache", help="inspect and clean the cache")
    actions = _build.add_actions(parser, "actions", "ACTION")
    _action(actions, "ls", _list, "list entries: size, age, last use, number of loads")
    info = _action(actions, "info", _info, "describe entries; --json prints all that is known")
    info.add_argument("names", nargs="+", metavar="NAME", help=_names.HELP)
    why = _action(actions, "why", _say_why, "explain a cache miss by the nearest entry")
    _build.add_selection(why)
    why.epilog = (
        f"OP may be {_names.HELP}. For an extension of yours, only changes of this machine are "
        f"listed, because the command does not know its sources and flags."
    )
    _action(actions, "verify", _verify, "compare every library with its checksum")
    clean = _action(actions, "clean", _clean, "delete entries that no process uses")
    clean.add_argument("names", nargs="*", metavar="NAME", help=f"{_names.HELP} (default: all)")
    clean.add_argument(
        "--unused-for", type=_days, metavar="DAYS", help="delete entries not used for DAYS"
    )
    clean.add_argument(
        "--max-size", metavar="SIZE", help="delete until the cache is no larger, as in 500M"
    )


def _action(actions: Any, name: str, run: Any, help: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = actions.add_parser(
        name, help=help, description=f"{help.capitalize()}."
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)
    return parser


def _days(text: str) -> float:
    try:
        days = float(text)
    except ValueError:
        days = -1.0
    if not 0 <= days < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of days, got {text!r}")
    return days * 24 * 3600


def _list(options: argparse.Namespace) -> None:
    items = _names.items()
    if options.json:
        print(json.dumps([_facts(item) for item in items], indent=1))
        return
    if not items:
        print(f"{_admin.location.configured_root()} is empty")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("name", overflow="fold")
    for title in ("digest", "size", "age", "unused", "loads"):
        table.add_column(title, no_wrap=True, justify="left" if title == "digest" else "right")
    for item in items:
        digest = str(item.entry.manifest.get("digest"))[:8]
        age, unused = _since(item.built), _since(item.used)
        table.add_row(item.name, digest, _size(item.size), age, unused, str(item.hits))
    console = Console()
    (console if console.is_terminal else Console(width=160)).print(table)
    total = sum(item.size for item in items)
    limit = _config.settings().cache_max_size
    print(f"{_names.entries(len(items))}, {_size(total)} of at most {_size(limit)}")


def _facts(item: _admin.eviction.Item) -> dict[str, Any]:
    return {
        "name": item.name,
        "folder": str(item.entry.folder),
        "library": str(item.entry.library),
        "size": item.size,
        "built": item.built,
        "used": item.used,
        "loads": item.hits,
    }


def _size(size: float) -> str:
    for unit in ("B", "K", "M"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} G"


def _since(when: float) -> str:
    seconds = max(0.0, time.time() - when)
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def _info(options: argparse.Namespace) -> int:
    among = _names.items()
    named = [item for name in options.names for item in _names.matching(name, among)]
    found = {item.entry.folder: item for item in named}.values()
    if options.json:
        facts = [{**_facts(item), "manifest": item.entry.manifest} for item in found]
        print(json.dumps(facts, indent=1))
    elif found:
        print("\n".join(map(_in_words, found)))
    else:
        print(f"the cache has no entry named {' or '.join(options.names)}")
    return 0 if found else 1


def _in_words(item: _admin.eviction.Item) -> str:
    manifest = item.entry.manifest
    request = manifest.get("request", {})
    sources = [name for name, _ in request.get("sources", ())] or ["text"]
    compilers = [str(one.get("version")) for one in manifest.get("compilers", {}).values()]
    facts = {
        "library": item.entry.library,
        "digest": manifest.get("digest"),
        "size": _size(item.size),
        "built": f"{_since(item.built)} ago, in {manifest.get('seconds')} s",
        "used": f"{_since(item.used)} ago, loads: {item.hits}",
        "for": _names.target(item.entry),
        "sources": f"{', '.join(sources)}; {len(manifest.get('inputs', ()))} files were read",
        "flags": " ".join(
            [*request.get("extra_cflags", ()), *request.get("extra_cuda_cflags", ())]
        ),
        "linked": " ".join(request.get("extra_ldflags", ())),
        "compiler": ", ".join(compilers),
        "torch": " ".join(str(one) for one in request.get("torch", ())[:1]),
    }
    lines = [f"  {title:8}  {fact}" for title, fact in facts.items() if fact]
    return "\n".join([f"{item.name} (--json prints the whole manifest)", *lines])


def _say_why(options: argparse.Namespace) -> None:
    told: dict[str, str] = {}
    among = _names.items()
    others = [name for name in options.ops if not _names.of_op(name)]
    options.ops = [name for name in options.ops if name not in others]
    for extension in _build.selected(options) if options.ops or not others else []:
        told[extension.name] = _why_not(extension)
    for name in others:
        exact = _names.of_extension(name)
        found = _names.matching(name, among)
        if exact is None and not found:
            raise _names.refuse(name)
        if exact is not None:
            told[exact.name] = _why_not(exact)
        for item in found if exact is None else []:
            told["/".join(item.entry.folder.parts[-2:])] = _why_not_here(item)
    if options.json:
        print(json.dumps(told, indent=1))
    else:
        print("\n".join(f"{name}: {reason}" for name, reason in told.items()))


def _why_not(extension: Extension) -> str:
    library = extension.find()
    return f"is in the cache: {library}" if library else _admin.sentence(extension.effective_spec)


def _why_not_here(item: _admin.eviction.Item) -> str:
    extension = _names.of_extension(item.name)
    if extension:
        reasons = _admin.against(extension.effective_spec, item.entry)
        return "; ".join(reasons) or "nothing differs, so this entry is a cache hit"
    reasons = _admin.against(None, item.entry)
    return "; ".join(reasons) or "this machine has not changed: a miss is due to sources or flags"


def _verify(options: argparse.Namespace) -> int:
    items = _names.items()
    wrong = [str(item.entry.folder) for item in items if _admin.entries.problem(item.entry)]
    if options.json:
        print(json.dumps({"checked": len(items), "damaged": wrong}, indent=1))
    else:
        verdict = f"{_names.entries(len(items))} checked, {len(wrong)} damaged"
        print("\n".join([*(f"damaged: {folder}" for folder in wrong), verdict]))
    return 1 if wrong else 0


def _clean(options: argparse.Namespace) -> None:
    among = _names.items()
    for name in options.names:
        if not (_names.matching(name, among) or _names.of_op(name) or _names.of_extension(name)):
            raise _names.refuse(name)
    named = [item for name in options.names for item in _names.matching(name, among)]
    chosen = {item.entry.folder for item in (named if options.names else among)}
    # Builds go to another folder while the configured one is unusable, so clean both.
    roots = [
        root for root in _admin.location.readable_roots() if _admin.location.unusable(root) is None
    ]
    if options.max_size is not None:
        try:
            limit = _config.size(options.max_size)
        except ValueError:
            raise ArgumentError(
                f"--max-size must be a size like 500M or 2G, got {options.max_size!r}"
            ) from None
        gone = [item for root in roots for item in _admin.eviction.evict(root, limit)]
    else:

        def unwanted(item: _admin.eviction.Item) -> bool:
            unused = options.unused_for is None or time.time() - item.used > options.unused_for
            return unused and item.entry.folder in chosen

        gone = [item for root in roots for item in _admin.eviction.clean(root, unwanted)]
    if options.json:
        print(json.dumps([_facts(item) for item in gone], indent=1))
    else:
        total = sum(item.size for item in gone)
        print(f"{_names.entries(len(gone))} deleted, {_size(total)}; {len(_names.items())} left")
