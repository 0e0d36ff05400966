"""What is not in the cache: lock, look again, build, publish; and remember what fails."""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import Any

from ops import _config
from ops._errors import BuildError, CacheError, JitopsError, NotBuiltError
from ops.jit import _compile_commands, _facts, _lookup, _precompiled
from ops.jit._cache import _inventory, _lock, _notes, _roots, _staging, _store
from ops.jit._compile import _build, _progress
from ops.jit._spec import Spec

# Beside the library: what it was made of, where that was text, and how.
_KEPT = ("main.cpp", "cuda.cu", "build.ninja", _compile_commands.NAME)


def build(
    spec: Spec, asked: dict[str, Any], digest: str, *, verbose: bool, retry: bool
) -> _store.Entry:
    """The entry for a request that was not found.

    Raises:
        JitopsError: those of :meth:`ops.jit.Extension.load`.
    """
    settings = _config.settings()
    if settings.build == "never":
        from ops.jit import _why

        raise NotBuiltError(
            f"{spec.name} is not built yet, and JITOPS_BUILD=never: {_why.sentence(spec)}"
        )
    root = _roots.writable_root()
    try:
        return _build_in(root, spec, asked, digest, verbose, retry or settings.retry)
    except JitopsError:
        raise
    except OSError as error:
        raise CacheError(f"{spec.name} cannot be kept in {root}: {error}") from error


def _build_in(
    root: Path, spec: Spec, asked: dict[str, Any], digest: str, verbose: bool, retry: bool
) -> _store.Entry:
    stem = _store.stem(spec.name, digest)
    surroundings = _facts.surroundings(spec)
    started = time.time()
    if not retry:
        _raise_remembered(root, stem, digest, surroundings)
    timeout = _config.settings().build_timeout
    with _lock.exclusive(_store.lock_path(root, stem), spec.name, timeout, _progress.say):
        entry = _lookup.find(spec, digest, ask=True)
        if entry:
            _facts.remember_compilers(spec, root)
            return entry
        # Of those that waited, one tries: the others are told.
        _raise_remembered(root, stem, digest, surroundings, since=started)
        try:
            entry = _build_here(root, spec, asked, digest, verbose)
        except BuildError as error:
            failure = _notes.Failure(
                digest, surroundings, str(error), error.log, time.time(), error.passing
            )
            _notes.remember_failure(root, stem, failure)
            raise
        _notes.forget_failure(root, stem)
        _facts.remember_compilers(spec, root)
    _inventory.sweep_traces(root)
    _inventory.evict(root, _config.settings().cache_max_size, spare=entry.folder)
    return entry


def _build_here(
    root: Path, spec: Spec, asked: dict[str, Any], digest: str, verbose: bool
) -> _store.Entry:
    stem = _store.stem(spec.name, digest)
    with _staging.staging(root, stem) as folder:
        started = time.time()
        build = functools.partial(
            _build.build,
            spec,
            folder,
            _facts.architectures(spec),
            _store.log_path(root, stem),
            echo=verbose,
        )
        built = _precompiled.serve(spec, folder, root, lambda first: build(include_first=first))
        facts = _facts.of(spec, built.read)
        changed = _facts.changed_meanwhile(spec, digest, facts, started)
        if changed:
            raise BuildError(
                f"{spec.name}: {changed} changed while it was being compiled, so that the "
                f"result cannot be trusted and was dropped. Run this again"
            )
        _compile_commands.write(folder, built.commands)
        about = {
            "name": spec.name,
            "digest": digest,
            "request": asked,
            "seconds": round(built.seconds, 3),
            "built": time.time(),
        }
        _precompiled.begin(spec, folder, root)
        return _store.publish(root, folder, built.library, facts, about, keep=_KEPT)


def _raise_remembered(
    root: Path, stem: str, digest: str, surroundings: str, since: float | None = None
) -> None:
    """Raise what is remembered: of a failure that lasts, or of any after the time ``since``."""
    failure = _notes.failure_of(root, stem, digest, surroundings)
    if failure is None:
        return
    if failure.passing if since is None else failure.when < since:
        return
    how = (
        "it was just tried" if since else f"tried {failure.age:.0f} s ago, and nothing has changed"
    )
    raise BuildError(
        f"{failure.message}\n  ({how}: not tried again. JITOPS_RETRY=1 tries again)",
        log=failure.log,
        passing=failure.passing,
    )
