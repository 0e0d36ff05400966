"""A miss: lock, look again, build, publish; those that wait share the result, or the failure."""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ops import _config
from ops._errors import BuildError, CacheError, JitopsError, NotBuiltError
from ops.jit import _inputs, _key, _pch, _progress, _record
from ops.jit._cache import _entries, _eviction, _location, _publish
from ops.jit._compile import _build, _compilers
from ops.jit._spec import Spec

# Kept beside the library: the sources of text, and how it was built.
_KEPT = ("main.cpp", "cuda.cu", "build.ninja")
_ATTEMPTS = 3  # where inputs are edited while the compilers run


def build(
    spec: Spec,
    asked: dict[str, Any],
    digest: str,
    find: Callable[[], _entries.Entry | None],
    verbose: bool,
) -> _entries.Entry:
    """Build an extension that was not found, or take it from another process that builds it.

    ``find`` looks for it again. Raises the errors of :meth:`ops.jit.Extension.load`.
    """
    settings = _config.settings()
    if settings.build == "never":
        from ops.jit import _admin

        reasons = "; ".join([_admin.sentence(spec), *_location.refusals()])
        raise NotBuiltError(
            f"{spec.name} is not built yet, and JITOPS_BUILD=never: {reasons}. Build it where that "
            f"is not set, or import a bundle that has it"
        )
    root = _location.writable_root()
    log = _publish.log_path(root, _entries.entry_name(spec.name, digest))
    of = [digest, *map(str, spec.header_roots)]  # headers may differ elsewhere
    started = time.time()
    try:
        path = _publish.lock_path(root, spec.name, digest)
        with _publish.exclusive(path, spec.name, settings.build_timeout, _progress.say) as lock:
            entry = find()
            if entry:
                return entry
            # Of those that waited, one tries, and the others are told.
            failure = lock.before
            if failure.get("of") == of and failure.get("since", 0.0) >= started:
                lock.write(**failure)  # for the next of them
                raise BuildError(failure["failed"], log=failure["log"])
            try:
                entry = _build_here(root, log, spec, asked, digest, verbose)
            except BuildError as error:
                lock.write(of=of, failed=str(error), log=error.log)
                raise
        # A finished build is not lost because something else cannot be deleted.
        with contextlib.suppress(OSError):
            log.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            _eviction.evict(root, settings.cache_max_size, newest=entry.folder)
        return entry
    except JitopsError:
        raise
    except OSError as error:
        raise CacheError(f"{spec.name} cannot be kept in {root}: {error}") from error


def _build_here(
    root: Path, log: Path, spec: Spec, asked: dict[str, Any], digest: str, verbose: bool
) -> _entries.Entry:
    with _publish.staging(root, _entries.entry_name(spec.name, digest)) as folder:
        for _ in range(_ATTEMPTS):
            started = time.time()
            with _pch.include_dir(spec, folder) as first:
                library = _build.build(spec, folder, log, include_first=first, echo=verbose)
            recorded = _record.record(spec, folder)
            changed = _inputs.changed_since(spec, recorded, started)
            if _key.digest(_key.request(spec)) != digest:
                changed = "a source"
            if not changed:
                break
            # Nobody knows which version the compiler read.
            _publish.clear(folder)
        else:
            raise BuildError(
                f"{spec.name}: {changed} changed while it was being compiled, each of {_ATTEMPTS} "
                f"times, so that no result can be trusted"
            )
        _compilers.check_torch()
        if not first:
            _pch.schedule(spec, root)
        manifest = {
            "name": spec.name,
            "digest": digest,
            "request": asked,
            "seconds": round(time.time() - started, 3),
            "built": time.time(),
            "replaceable": spec.is_header,
            **recorded,
        }
        return _publish.publish(root, folder, library, manifest, keep=_KEPT)
