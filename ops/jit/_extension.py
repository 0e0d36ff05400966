"""An extension, found or built, and loaded."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from ops import _config
from ops._errors import BuildError, CacheError
from ops.jit import _debug, _key, _library, _lookup
from ops.jit._cache import _store
from ops.jit._compile import _toolchain
from ops.jit._spec import Spec


class Extension:
    """Native code that is compiled when first needed, then kept for good.

    Args:
        spec: what to compile.
        instead: what serves as well, best first, where it is built and ``spec`` is not and cannot
            be: in a bundle, under ``JITOPS_BUILD=never``, without a compiler.

    A second :meth:`load`, in this process or any later one, runs no compiler, no ninja and no
    other program, and waits for no lock. It does check, by content, that sources, headers, flags,
    compilers, torch and the rest of :mod:`ops.jit._key` are those of the build, and that the
    library is byte for byte the one that was built. An edited source is built anew, and takes the
    place of what was loaded.
    """

    def __init__(self, spec: Spec, instead: tuple[Spec, ...] = ()) -> None:
        self.spec = spec
        self.instead = instead

    @property
    def name(self) -> str:
        """The extension's name."""
        return self.spec.name

    @property
    def in_force(self) -> Spec:
        """What is compiled: ``spec``, with what ``JITOPS_DEBUG`` and ``JITOPS_SANITIZE`` add."""
        return _debug.in_force(self.spec)

    def find(self) -> Path | None:
        """The built library in the cache, verified; ``None`` if it would have to be built."""
        entry = self._find(_key.digest(_key.request(self.in_force)))
        return entry.library if entry else None

    def place(self) -> str | None:
        """As :meth:`find`, for people: an entry of a bundle is named as that."""
        entry = self._find(_key.digest(_key.request(self.in_force)))
        return entry.place if entry else None

    def load(self, *, verbose: bool = False) -> ModuleType | Path:
        """Build if need be, and load.

        Args:
            verbose: say what is done, and pass on what the compilers say.

        Returns:
            The Python module, or with ``is_python_module=False`` the library's path, its operators
            being registered in :data:`torch.ops`; with ``is_standalone`` the program's.

        Raises:
            ToolchainError: it is not built yet, and a tool to build it with is missing.
            NotBuiltError: it is not built yet, and ``JITOPS_BUILD=never``.
            BuildError: it does not compile, link or load.
            BuildTimeoutError: another process has been building it for too long.
            CacheError: there is nowhere to keep it.
        """
        return self.load_entry(verbose=verbose)[0]

    def load_entry(self, *, verbose: bool = False) -> tuple[ModuleType | Path, _store.Entry]:
        """As :meth:`load`; and what it was loaded from."""
        spec = self.in_force
        for _ in range(3):
            entry = self._entry(spec, verbose)
            try:
                return _library.load(spec, entry), entry
            except _library.Vanished:
                continue
            except (OSError, ImportError) as error:
                if isinstance(error, BuildError):
                    raise
                raise _refused(spec, entry, error) from error
        raise CacheError(f"{self.name} is deleted as soon as it is built: is the cache too small?")

    def build(self, *, verbose: bool = False, retry: bool = False) -> Path:
        """Build if need be, and load nothing: for images, and for machines without a GPU.

        Args:
            verbose: say what is done, and pass on what the compilers say.
            retry: try again what has failed, though nothing has changed.

        Returns:
            The library. Raises what :meth:`load` raises.
        """
        return self.build_entry(verbose=verbose, retry=retry).library

    def build_entry(self, *, verbose: bool = False, retry: bool = False) -> _store.Entry:
        """As :meth:`build`; the whole entry."""
        return self._entry(self.in_force, verbose, retry)

    def _entry(self, spec: Spec, verbose: bool, retry: bool = False) -> _store.Entry:
        asked = _key.request(spec)
        digest = _key.digest(asked)
        entry = self._find(digest)
        if entry is None:
            from ops.jit import _miss  # a hit needs none of it

            return _miss.build(spec, asked, digest, verbose=verbose, retry=retry)
        if verbose:
            from ops.jit._compile import _progress

            _progress.say(f"{spec.name} is in the cache: {entry.place}")
        return entry

    def _find(self, digest: str) -> _store.Entry | None:
        entry = _lookup.find(self.in_force, digest)
        if entry is None and self.instead and _cannot_build():
            for spec in map(_debug.in_force, self.instead):
                entry = entry or _lookup.find(spec, _key.digest(_key.request(spec)))
        return entry


def _cannot_build() -> bool:
    settings = _config.settings()
    never = settings.build == "never"
    return never or settings.bundle is not None or _toolchain.cxx() is None


def _refused(spec: Spec, entry: _store.Entry, error: Exception) -> BuildError:
    """What the dynamic linker has against it."""
    from ops.jit._compile._diagnose import all_of, diagnose

    said = diagnose(all_of(error), lambda file, line: None)
    return BuildError(
        f"{spec.name} was built but does not load:\n{said}\n  library: {entry.place}",
        passing=True,  # it is found again, and says the same again
    )
