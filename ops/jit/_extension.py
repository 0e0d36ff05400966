"""The public class :class:`Extension`: found or built, and loaded."""

import dataclasses
import functools
import warnings
from pathlib import Path
from types import ModuleType

from ops import _config
from ops._errors import BuildError, CacheError, CacheWarning, boundary
from ops.jit import _inputs, _key, _load, _progress
from ops.jit._cache import _entries
from ops.jit._cache._entries import Entry
from ops.jit._compile import _compilers, importing
from ops.jit._spec import Spec


class Extension:
    """Native code that is compiled when first needed, then kept for good.

    Args:
        spec: describes the code.
        fallbacks: specs to use instead, best first, where they are built and ``spec`` is neither
            built nor can be: in a bundle, under ``JITOPS_BUILD=never``, without a compiler.

    A second :meth:`load`, in this process or any later one, runs no program and waits for no lock.
    (It does ask a compiler behind a launcher or a script who it is.) It checks that sources,
    headers, flags, compilers and torch are those of the build, and that the library is byte for
    byte the one that was built. An edited source is built anew, and replaces the code that was
    loaded.
    """

    def __init__(self, spec: Spec, fallbacks: tuple[Spec, ...] = ()) -> None:
        self.spec = spec
        self.fallbacks = fallbacks

    @property
    def name(self) -> str:
        """The extension's name."""
        return self.spec.name

    @property
    def effective_spec(self) -> Spec:
        """The spec with the flags that ``JITOPS_DEBUG`` and ``JITOPS_SANITIZE`` add."""
        spec, settings = self.spec, _config.settings()
        if not settings.debug and not settings.sanitize:
            return spec
        debug = ("-O0", "-DJITOPS_DEBUG") if settings.debug else ()
        sanitize = (f"-fsanitize={','.join(settings.sanitize)}",) if settings.sanitize else ()
        cflags = (*debug, *sanitize, "-g", "-fno-omit-frame-pointer")
        cuda_cflags = (*debug, "-g", "-lineinfo") if debug and spec.uses_cuda else ()
        return dataclasses.replace(
            spec,
            extra_cflags=spec.extra_cflags + cflags,
            extra_cuda_cflags=spec.extra_cuda_cflags + cuda_cflags,
            extra_ldflags=spec.extra_ldflags + sanitize,
        )

    def find(self) -> Path | None:
        """Return the built library, verified; ``None`` if it would have to be built."""
        entry = self._find()[0]
        return entry.library if entry else None

    @boundary
    def load(self, *, verbose: bool = False) -> ModuleType | Path:
        """Build if need be, and load.

        Args:
            verbose: print each step, and the output of the compilers.

        Returns:
            The Python module, or with ``is_python_module=False`` the library's path, its operators
            being registered in :data:`torch.ops`; with ``is_standalone`` the program's.

        Raises:
            ToolchainError: it is not built yet, and a tool to build it with is missing.
            NotBuiltError: it is not built yet, and ``JITOPS_BUILD=never``.
            BuildError: it does not compile, link or load. If it does not load, it is an
                ``ImportError`` too, or an ``OSError`` for a library of operators.
            BuildTimeoutError: another process has been building it for too long.
            CacheError: there is nowhere to keep it.
        """
        for _ in range(3):
            entry = self.build_entry(verbose=verbose)
            try:
                if loaded := _load.load(self.effective_spec, entry):
                    return loaded
            except BuildError:
                raise
            except (OSError, ImportError) as error:
                from ops.jit._compile import _diagnostics

                raise _diagnostics.refused(self.spec, str(entry.library), error) from error
        raise CacheError(f"{self.name} is deleted as soon as it is built: is the cache too small?")

    @boundary
    def build(self, *, verbose: bool = False, retry: bool = False) -> Path:
        """Build if need be, and load nothing: for images, and for machines without a GPU.

        Args:
            verbose: print each step, and the output of the compilers.
            retry: of no effect, because a build that has failed is always tried again.

        Returns:
            The library. Raises the errors of :meth:`load`.
        """
        return self.build_entry(verbose=verbose).library

    def build_entry(self, *, verbose: bool = False) -> Entry:
        """Build as :meth:`build` does; return the whole entry."""
        entry, asked, digest = self._find()
        if entry is None:
            with importing:
                from ops.jit import _build_once  # a hit needs none of it

            spec = self.effective_spec
            return _build_once.build(spec, asked, digest, lambda: _find(spec, digest), verbose)
        if missing := _compilers.missing_cxx():
            said = f"{missing}: {self.name} is used as another compiler has built it"
            warnings.warn(said, CacheWarning, stacklevel=3)
        if verbose:
            _progress.say(f"{self.name} is in the cache: {entry.library}")
        return entry

    def _find(self) -> tuple[Entry | None, dict[str, object], str]:
        spec = self.effective_spec
        asked = _key.request(spec)
        digest = _key.digest(asked)
        entry = _find(spec, digest)
        if entry is None and self.fallbacks:
            settings = _config.settings()
            if settings.build == "never" or settings.bundle or _compilers.cxx() is None:
                for other in (Extension(one).effective_spec for one in self.fallbacks):
                    entry = entry or _find(other, _key.digest(_key.request(other)))
        return entry, asked, digest


def _find(spec: Spec, digest: str) -> Entry | None:
    """Find an entry that serves, in the bundle and then in the cache; its library is verified."""
    first: list[Path] = []
    if bundle := _config.settings().bundle:
        from ops.jit._cache import _bundle

        first.append(_bundle.root(bundle))
    accepts = functools.partial(_inputs.accepts, spec, digest)
    return _entries.find(_entries.entry_name(spec.name, digest), accepts, first)
