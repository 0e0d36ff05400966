"""From a spec to a loaded library: find, else lock, find again, build, publish."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import threading
import time
from pathlib import Path
from types import ModuleType

import torch

from ops import _config
from ops._errors import BuildError, CacheError, JitopsError
from ops.jit import _key, _roots, _store
from ops.jit._spec import Spec

# What this process has loaded, by the entry's folder: a library is initialised once.
_loaded: dict[Path, ModuleType | Path] = {}
_loading = threading.RLock()
# A thread that holds it is not there in a forked child, and would never give it back.
os.register_at_fork(after_in_child=lambda: globals().update(_loading=threading.RLock()))


class Extension:
    """Native code that is compiled when first needed, then kept for good.

    Args:
        spec: what to compile.

    A second :meth:`load`, in this process or any later one, runs no compiler, no ninja and no
    other program, takes no lock and writes nothing. It does check, by content, that sources,
    headers, flags, compilers, torch and the rest of :mod:`ops.jit._key` are those of the build,
    and that the library is byte for byte the one that was built.
    """

    def __init__(self, spec: Spec) -> None:
        self.spec = spec

    @property
    def name(self) -> str:
        """The extension's name."""
        return self.spec.name

    def find(self) -> Path | None:
        """The built library in the cache, verified; ``None`` if it would have to be built."""
        entry = self._find(_key.digest(_key.request(self.spec)), ask=False)
        return entry.library if entry else None

    def load(self) -> ModuleType | Path:
        """Build if need be, and load.

        Returns:
            The Python module, or with ``is_python_module=False`` the library's path, its operators
            being registered in :data:`torch.ops`.

        Raises:
            ToolchainError: it is not built yet, and a tool to build it with is missing.
            BuildError: it does not compile, link or load.
            BuildTimeoutError: another process has been building it for too long.
            CacheError: there is nowhere to keep it.
        """
        asked = _key.request(self.spec)
        digest = _key.digest(asked)
        with _loading:
            entry = self._find(digest, ask=False)
            return self._open(entry) if entry else self._build(asked, digest)

    def _find(self, digest: str, ask: bool) -> _store.Entry | None:
        return _store.find(self.name, digest, lambda m: _key.accepts(self.spec, m, ask))

    def _build(self, asked: dict[str, object], digest: str) -> ModuleType | Path:
        root = _roots.writable_root()
        try:
            return self._build_in(root, asked, digest)
        except JitopsError:
            raise
        except OSError as error:
            raise CacheError(f"{self.name} cannot be kept in {root}: {error}") from error

    def _build_in(self, root: Path, asked: dict[str, object], digest: str) -> ModuleType | Path:
        from ops.jit import _build, _lock, _progress  # a hit needs none of them

        timeout = _config.settings().build_timeout
        path = _store.lock_path(root, self.name, digest)
        with _lock.exclusive(path, self.name, timeout, _progress.say):
            entry = self._find(digest, ask=True)
            if entry:
                _key.remember_compilers(self.spec, root)
                return self._open(entry)
            with _store.staging(root, self.name, digest) as folder:
                log = _store.log_path(root, self.name, digest)
                started = time.time()
                built = _build.build(self.spec, folder, _key.architectures(self.spec), log)
                changed = _key.changed(self.spec, digest, built.headers, started)
                if changed:
                    raise BuildError(
                        f"{self.name}: {changed} changed while it was being compiled, so that the "
                        f"result cannot be trusted and was dropped. Run this again"
                    )
                about = {
                    "request": asked,
                    "module": built.library.name.partition(".")[0],
                    "seconds": round(built.seconds, 3),
                    "built": time.time(),
                }
                facts = _key.facts(self.spec, built.headers)
                entry = _store.publish(root, self.name, digest, folder, built.library, facts, about)
            _key.remember_compilers(self.spec, root)
            # torch has loaded the library it built; renaming its folder does not change that.
            _loaded[entry.folder] = built.module or entry.library
            return _loaded[entry.folder]

    def _open(self, entry: _store.Entry) -> ModuleType | Path:
        if entry.folder not in _loaded:
            try:
                _loaded[entry.folder] = self._dlopen(entry)
            except (OSError, ImportError) as error:
                from ops.jit._diagnose import all_of, diagnose

                said = diagnose(all_of(error), lambda file, line: None)
                raise BuildError(
                    f"{self.name} was built but does not load:\n{said}\n  library: {entry.library}"
                ) from error
        return _loaded[entry.folder]

    def _dlopen(self, entry: _store.Entry) -> ModuleType | Path:
        if not self.spec.is_python_module:
            torch.ops.load_library(str(entry.library))
            return entry.library
        name = str(entry.manifest["module"])
        loader = importlib.machinery.ExtensionFileLoader(name, str(entry.library))
        spec = importlib.util.spec_from_file_location(name, entry.library, loader=loader)
        if spec is None:
            raise ImportError(f"no import spec for {entry.library}")
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
        return module
