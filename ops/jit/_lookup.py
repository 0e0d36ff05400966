"""Looking an extension up: in the bundle, then in the cache."""

from __future__ import annotations

from typing import Any

from ops import _config
from ops.jit import _facts
from ops.jit._cache import _store
from ops.jit._spec import Spec


def find(spec: Spec, digest: str, ask: bool = False) -> _store.Entry | None:
    """The entry that serves, its library verified; see :func:`ops.jit._facts.accepts`."""

    def serves(manifest: dict[str, Any]) -> bool:
        return manifest.get("digest") == digest and _facts.accepts(spec, manifest, ask)

    stem = _store.stem(spec.name, digest)
    if _config.settings().bundle is not None:
        from ops.jit._cache import _bundle

        entry = _bundle.find(stem, serves)
        if entry:
            return entry
    return _store.find(stem, serves)
