"""An op's back ends: built, loaded and chosen between. The public :class:`ops.Op`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from ops import _config
from ops._core import extensions, selection
from ops._core.selection import BACKEND_OF, DEVICE_OF, MAY_FALL_BACK, Choice
from ops._errors import (
    ArgumentError,
    ArgumentTypeError,
    BackendUnavailableError,
    BackendWarning,
    JitopsError,
)
from ops.jit import Extension
from ops.jit._compile import _compilers

Source = Extension | Callable[[], Extension]


class Op:
    """The back ends of an op: the pure-torch path, and its compiled ones.

    Args:
        name: the name of the op, for messages and :func:`ops.explain`.
        cpp: the :class:`ops.jit.Extension` that serves CPU tensors, or a function that makes it.
        cuda: the same for CUDA tensors.

    An op asks :meth:`backend_for` at each call, and runs what it is told.

    Raises:
        ArgumentTypeError: a name that is no string, a back end that is no extension.
        ArgumentError: the name of a built-in op.
    """

    def __init__(self, name: str, cpp: Source | None = None, cuda: Source | None = None) -> None:
        if not isinstance(name, str):
            raise ArgumentTypeError(f"name must be a string, got {type(name).__name__}")
        for backend, source in (("cpp", cpp), ("cuda", cuda)):
            if not (source is None or isinstance(source, Extension) or callable(source)):
                raise ArgumentTypeError(
                    f"{backend} must be an Extension, as of ops.jit.text or ops.jit.files, or a "
                    f"function that makes one, got {type(source).__name__}"
                )
        if name in extensions.stems():
            raise ArgumentError(f"name must not be that of a built-in op, got {name!r}")
        self._begin(name, cpp, cuda)

    def _begin(self, name: str, cpp: Source | None, cuda: Source | None) -> None:
        self.name = name
        self._sources = {"cpp": cpp, "cuda": cuda}
        self._chosen: dict[tuple[str | None, str], str] = {}
        self._loaded: dict[str, ModuleType | Path] = {}
        self._older: dict[str, ModuleType | Path] = {}  # what a reload that failed would replace
        _ops[name] = self

    def backend_for(self, tensor: Tensor) -> str:
        """The back end that runs this op on ``tensor``, built, loaded and ready to be called.

        Returns:
            ``torch``, ``cpp`` or ``cuda``.

        Raises:
            BackendUnavailableError: the requested back end cannot run.
        """
        asked, device = selection.request.backend, tensor.device.type
        if torch.compiler.is_compiling():
            return _settle(self.name, asked, device)
        chosen = self._chosen.get((asked, device))
        return chosen or _settle(self.name, asked, device)

    def backend_in_graphs(self, tensor: Tensor) -> str:
        """The back end for a graph that was made for a compiled one, as :meth:`backend_for`.

        Where no back end is requested by name, the graph requests ``compiled``.
        """
        asked, device = selection.request.backend, tensor.device.type
        if (asked or _config.settings().backend) == "auto":
            asked = "compiled"
        chosen = self._chosen.get((asked, device))
        return chosen or _settle(self.name, asked, device)

    def only_torch(self, tensor: Tensor, problem: str) -> None:
        """Take the pure-torch path for a call that no compiled back end can run.

        Args:
            tensor: an argument of the call.
            problem: why they cannot.

        Raises:
            BackendUnavailableError: a compiled back end is requested.
        """
        _only_torch(self.name, selection.request.backend, tensor.device.type, problem)

    def prepare(self) -> None:
        """Build or load the back end that the settings select, when the op is imported."""
        settings = _config.settings()
        if settings.force_cpu:
            return
        if settings.backend in DEVICE_OF:
            _settle(self.name, None, DEVICE_OF[settings.backend])
        elif settings.backend in MAY_FALL_BACK and selection.has_gpu():
            _settle(self.name, None, "cuda")
        elif settings.backend == "compiled":
            _settle(self.name, None, "cpu")

    def extension(self, backend: str) -> Extension | None:
        """The extension of a compiled back end; ``None`` if the op has no such back end."""
        source = self._sources[backend]
        return source() if callable(source) else source

    def load(self, backend: str) -> ModuleType | Path:
        """Build a compiled back end if necessary, and load it once.

        Returns and raises the same as :meth:`ops.jit.Extension.load`. In addition:

        Raises:
            BackendUnavailableError: the op has no such back end.
        """
        if backend not in self._loaded:
            try:
                self._load_anew(backend)
            except JitopsError:
                if backend not in self._older:
                    raise
                self._loaded[backend] = self._older[backend]  # reload() has raised that error
            self._older.pop(backend, None)
        return self._loaded[backend]

    def _load_anew(self, backend: str) -> None:
        extension = self.extension(backend)
        if extension is None:
            raise BackendUnavailableError(f"{self.name} has no back end {backend!r}")
        self._loaded[backend] = extension.load()

    def reload(self) -> None:
        """Build edited sources, and replace the loaded library.

        Raises the same as :meth:`load`. If a back end cannot be built, the next call that needs it
        tries once more. If that fails too, the older library stays in use.
        """
        self._chosen.clear()
        for backend in {**self._older, **self._loaded}:
            if backend in self._loaded:
                self._older[backend] = self._loaded.pop(backend)
            self._load_anew(backend)
            del self._older[backend]

    def choose(self, asked: str | None, device: str) -> Choice:
        """The first candidate, before any look-up, build or load.

        Raises:
            BackendUnavailableError: the requested back end does not serve tensors on ``device``.
        """
        settings = _config.settings()
        if settings.force_cpu:
            return Choice("torch", "JITOPS_FORCE_CPU=1")
        by = f"use_backend({asked!r})" if asked else f"JITOPS_BACKEND={settings.backend}"
        wanted = asked or settings.backend
        if wanted == "torch":
            return Choice("torch", by)
        if wanted in MAY_FALL_BACK:
            backend = BACKEND_OF.get(device)
            if backend is None or (wanted == "auto" and backend != "cuda"):
                return Choice("torch", f"{wanted} takes the pure-torch path for {device} tensors")
            if self._sources[backend] is None:
                return Choice("torch", f"the op has no {backend} back end")
            return Choice(backend, f"{wanted} prefers it for {device} tensors")
        if device != DEVICE_OF[wanted]:
            raise BackendUnavailableError(
                f"{self.name}: back end {wanted!r} was asked for ({by}) and serves "
                f"{DEVICE_OF[wanted]} tensors, got {device} tensors"
            )
        return Choice(wanted, by)

    def without(self, backend: str, asked: str | None, problem: str) -> Choice:
        """The pure-torch path in place of ``backend``, which cannot run.

        Raises:
            BackendUnavailableError: the settings allow no fall-back.
        """
        settings = _config.settings()
        wanted = asked or settings.backend
        if wanted not in MAY_FALL_BACK:
            raise BackendUnavailableError(
                f"{self.name}: back end {backend!r} was asked for and cannot run: {problem}"
            ) from None
        if settings.strict:
            raise BackendUnavailableError(
                f"{self.name}: JITOPS_STRICT=1 forbids falling back from {backend!r}: {problem}"
            ) from None
        refused = f"{backend} cannot run: {problem}"
        return Choice("torch", f"{wanted} falls back: {refused}", refused)

    def problem_with(self, backend: str) -> str | None:
        """Why a compiled back end cannot run here; ``None`` when it is built, or seems buildable.

        Builds and loads nothing.
        """
        try:
            settings = _config.settings()
            extension = self.extension(backend)
            if extension is None:
                return f"{self.name} has no back end {backend!r}"
            if extension.find() is None:
                if settings.build == "never":
                    return f"{extension.name} is not built yet, and JITOPS_BUILD=never"
                _compilers.check(with_cuda=backend == "cuda")
            if settings.sanitize:
                from ops.jit import _load

                _load.check_sanitizer()
        except JitopsError as error:
            return str(error)
        if backend == "cuda" and not selection.has_gpu():
            return "torch sees no GPU"
        return None


_ops: dict[str, Op] = {}


def built_in(stem: str) -> Op:
    """The op that ``cuda_src`` has sources of, which may not have been imported yet."""
    if stem not in _ops:
        Op.__new__(Op)._begin(stem, *extensions.makers(stem))
    return _ops[stem]


def known() -> dict[str, Op]:
    """All ops that have back ends, by name: the built-in ones and those of users."""
    return {**{stem: built_in(stem) for stem in extensions.stems()}, **_ops}


def used_by(call: Callable[[], object]) -> list[Op]:
    """The ops that choose a back end while ``call`` runs on the pure-torch path."""
    for op in _ops.values():
        for asked, device in list(op._chosen):
            if asked == "torch":
                del op._chosen[asked, device]
    with selection.use_backend("torch"):
        call()
    return [op for op in _ops.values() if any(asked == "torch" for asked, _ in op._chosen)]


def _settle(name: str, asked: str | None, device: str) -> str:
    """Choose, load, and remember."""
    op = _ops[name]
    if (asked, device) in op._chosen:  # torch.compile comes here for each graph
        return op._chosen[asked, device]
    choice = op.choose(asked, device)
    if choice.backend in DEVICE_OF:
        try:
            op.load(choice.backend)
        except JitopsError as error:
            choice = op.without(choice.backend, asked, str(error))
    _warn_of(choice, name)
    op._chosen[asked, device] = choice.backend
    return choice.backend


def _only_torch(name: str, asked: str | None, device: str, problem: str) -> None:
    op = _ops[name]
    choice = op.choose(asked, device)
    if choice.backend in DEVICE_OF:
        _warn_of(op.without(choice.backend, asked, problem), name)


def _warn_of(choice: Choice, name: str) -> None:
    if choice.refused:
        warnings.warn(
            f"{name} runs on the pure-torch path, since {choice.refused}. "
            f"JITOPS_BACKEND=torch asks for that path and silences this",
            BackendWarning,
            stacklevel=4,
        )


# torch.compile runs them while tracing and takes the results as constants. This is the mark that
# torch.compiler.assume_constant_result sets. Calling it would import all of torch._dynamo.
_settle._dynamo_marked_constant = True  # type: ignore[attr-defined]
_only_torch._dynamo_marked_constant = True  # type: ignore[attr-defined]
