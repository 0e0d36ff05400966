"""Why an extension is not in the cache: what differs from the nearest entry of its name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from ops._errors import JitopsError
from ops.jit import _inputs, _key
from ops.jit._cache import _bundle, _entries, _location
from ops.jit._spec import Spec


def sentence(spec: Spec) -> str:
    """Return the reason in a line."""
    found = reasons(spec)
    if found is None:
        return "there is nothing of that name in the cache"
    return "; ".join(found) or "nothing differs: it is in the cache"


def reasons(spec: Spec) -> list[str] | None:
    """List what differs from the nearest entry, readably.

    Returns:
        One line for each difference, none if the entry serves; ``None`` if no entry has that name.
    """
    found = (against(spec, entry) for entry in _entries_of(spec.name))
    # Of as many differences, the smaller ones: one flag, not all of them.
    return min(found, key=lambda its: (len(its), sum(map(len, its))), default=None)


def against(spec: Spec | None, entry: _entries.Entry) -> list[str]:
    """List why an entry does not serve.

    Args:
        spec: the extension; ``None``: the one that the entry was built for, on this machine.
        entry: of the cache.
    """
    before = entry.manifest.get("request")
    if not isinstance(before, dict) or before.get("format") != _key.FORMAT:
        return ["it was built by another version of jitops"]
    try:
        asked = json.loads(json.dumps(_key.request(spec) if spec else _key.again(before)))
        found = list(_requests(before, asked))
        if spec:
            found += _inputs.differences(spec, entry.manifest)
        else:
            found += _inputs.of_machine(entry.manifest)
    except _inputs.UNREADABLE as error:
        if isinstance(error, JitopsError):
            raise
        return ["its manifest cannot be read"]
    return found or ([] if _entries.verify(entry) else ["its library is damaged"])


def _entries_of(name: str) -> Iterator[_entries.Entry]:
    yield from _bundle.entries_of(name)
    for root in _location.readable_roots():
        for path in root.glob(f"{name}-????????????????/*/manifest.json"):
            entry = _entries.open_entry(path.parent)
            if entry and entry.manifest.get("name") == name:
                yield entry


def _requests(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    for field in sorted({*before, *now}):
        old, new = before.get(field), now.get(field)
        if old == new:
            continue
        if field in ("sources", "files"):
            yield from _files(field, dict(old or []), dict(new or []))
        elif field in ("cpp_sources", "cuda_sources"):
            yield f"{field}: the text has changed"
        elif isinstance(old, list) and isinstance(new, list) and field != "torch":
            less, more = ([one for one in a if one not in b] for a, b in ((old, new), (new, old)))
            yield f"{field}: {_list(less)} → {_list(more)}" if less or more else f"{field}: order"
        elif isinstance(old, dict) and isinstance(new, dict):
            for name in sorted({*old, *new}):
                if old.get(name) != new.get(name):
                    yield f"{field} {name}: {old.get(name)} → {new.get(name)}"
        else:
            yield f"{field}: {_list(old)} → {_list(new)}"


def _files(field: str, old: dict[str, str], new: dict[str, str]) -> Iterator[str]:
    for name in sorted({*old, *new}):
        if old.get(name) != new.get(name):
            how = "is new" if name not in old else "is gone" if name not in new else "has changed"
            yield f"{field}: {name} {how}"


def _list(value: Any) -> str:
    if not isinstance(value, list):
        return str(value)
    return " ".join(map(str, value)) or "none"
