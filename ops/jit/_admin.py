"""The loader as the commands of this package use it; and why an extension is not in the cache."""

import json
from collections.abc import Iterator
from typing import Any

from ops import _config
from ops._errors import JitopsError
from ops.jit import _inputs, _key
from ops.jit._cache import (
    _bundle as bundle,
    _entries as entries,
    _eviction as eviction,
    _location as location,
    _publish as publish,
)
from ops.jit._compile import _compilers as compilers, _cpu as cpu, _gpu_archs as gpu_archs
from ops.jit._spec import Spec

__all__ = ["bundle", "compilers", "cpu", "entries", "eviction", "gpu_archs", "location", "publish"]


def last_failure(spec: Spec) -> str | None:
    """Return the error of the last build of this very extension, if that failed."""
    digest = _key.digest(_key.request(spec))
    paths = (publish.lock_path(one, spec.name, digest) for one in location.readable_roots())
    notes = map(publish.note, paths)
    return next((str(one["failed"]) for one in notes if digest in one.get("of", ())), None)


def sentence(spec: Spec) -> str:
    """Return the reason in a line."""
    found = reasons(spec)
    if found is None:
        return "there is nothing of that name in the cache"
    return "; ".join(found) or "nothing differs: it is in the cache"


def reasons(spec: Spec) -> list[str] | None:
    """List how an extension differs from the nearest entry; ``None`` if no entry has its name."""
    path = _config.settings().bundle
    roots = [*([bundle.root(path)] if path else []), *location.readable_roots()]
    its = (one.entry for root in roots for one in eviction.items(root) if one.name == spec.name)
    found = (against(spec, entry) for entry in its)
    # Of as many differences, the smaller ones: one flag, not all of them.
    return min(found, key=lambda its: (len(its), sum(map(len, its))), default=None)


def against(spec: Spec | None, entry: entries.Entry) -> list[str]:
    """List why an entry does not serve ``spec``, or its own extension on this machine."""
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
    damage = entries.problem(entry)
    return found or ([damage] if damage else [])


def _requests(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    for field in sorted({*before, *now}):
        old, new = before.get(field), now.get(field)
        if old == new:
            continue
        if field in ("sources", "files"):
            olds, news = dict(old or []), dict(new or [])
            changed = [one for one in {**olds, **news} if olds.get(one) != news.get(one)]
            for name in changed or ["their order"]:
                yield f"{field}: {name} has changed, or is there in one of the two only"
        elif field in ("cpp_sources", "cuda_sources"):
            yield f"{field}: the text has changed"
        elif isinstance(old, dict) and isinstance(new, dict):
            for name in (one for one in {**old, **new} if old.get(one) != new.get(one)):
                yield f"{field} {name}: {old.get(name)} → {new.get(name)}"
        elif isinstance(old, list) and isinstance(new, list) and field != "torch":
            less, more = ([one for one in a if one not in b] for a, b in ((old, new), (new, old)))
            yield f"{field}: {_list(less)} → {_list(more)}" if less or more else f"{field}: order"
        else:
            yield f"{field}: {_list(old)} → {_list(new)}"


def _list(value: Any) -> str:
    return (" ".join(map(str, value)) or "none") if isinstance(value, list) else str(value)
