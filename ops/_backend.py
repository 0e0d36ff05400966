"""Which back end runs an op: the ordered candidates, the choice, why the others were refused.

============  ==============================  ===========================================
asked for     tensors on                      runs
============  ==============================  ===========================================
``auto``      a CUDA device                   ``cuda``; if it cannot, ``torch``, with one
                                              warning (an error under ``JITOPS_STRICT=1``)
``auto``      any other device                ``torch``; nothing is compiled
``torch``     any device                      ``torch``
``cpp``       the CPU                         ``cpp``, or an error
``cuda``      a CUDA device                   ``cuda``, or an error
============  ==============================  ===========================================
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ops import _config, _extensions
from ops._errors import (
    BackendUnavailableError,
    BackendWarning,
    ConfigError,
    JitopsError,
)
from ops.jit import _hardware, _toolchain

DEVICE_OF = {"cpp": "cpu", "cuda": "cuda"}  # a compiled back end serves one kind of device


class _Request:
    """What :func:`use_backend` has asked for; ``None``: ``JITOPS_BACKEND`` decides.

    An attribute, so that :func:`torch.compile` guards on it: a graph compiled for one back end is
    not used when another is asked for.
    """

    backend: str | None = None


_request = _Request()


@contextlib.contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Ask for a back end within a ``with`` block, in place of ``JITOPS_BACKEND``.

    Holds for the whole process, as torch's own back-end flags do: not for threads that ask for
    different ones at once. The backward pass runs on the
    back end that its forward pass ran on.

    Args:
        backend: ``auto``, ``torch``, ``cpp`` or ``cuda``.

    Raises:
        ConfigError: no such back end, or ``JITOPS_FORCE_CPU`` forbids it.
    """
    try:
        _config.backend_name(backend)
    except ValueError:
        raise ConfigError(
            f"backend must be one of {', '.join(_config.BACKENDS)}, got {backend!r}"
        ) from None
    if backend in DEVICE_OF and _config.settings().force_cpu:
        raise ConfigError(f"use_backend({backend!r}) contradicts JITOPS_FORCE_CPU: unset it")
    before = _request.backend
    _request.backend = backend
    try:
        yield
    finally:
        _request.backend = before


def requested() -> str | None:
    """What the innermost :func:`use_backend` asks for."""
    return _request.backend


@dataclass(frozen=True)
class Choice:
    """A back end and why it is the one; ``refused`` says why a preferred one is not."""

    backend: str
    reason: str
    refused: str | None = None


@dataclass
class Op:
    """An op's back ends. ``stem`` is its name everywhere: module, sources, operators, tests."""

    stem: str
    _chosen: dict[tuple[str | None, str], str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _ops[self.stem] = self

    def backend_for(self, tensor: Tensor) -> str:
        """The back end that runs this op on ``tensor``, ready to be called.

        Raises:
            BackendUnavailableError: the one asked for cannot run.
        """
        asked, device = _request.backend, tensor.device.type
        if torch.compiler.is_compiling():
            return _settle(self.stem, asked, device)
        chosen = self._chosen.get((asked, device))
        return chosen or _settle(self.stem, asked, device)

    def prepare(self) -> None:
        """At import: build or load what the settings select already."""
        settings = _config.settings()
        if settings.force_cpu:
            return
        if settings.backend in DEVICE_OF:
            _settle(self.stem, None, DEVICE_OF[settings.backend])
        elif settings.backend == "auto" and _hardware.has_gpu():
            _settle(self.stem, None, "cuda")


_ops: dict[str, Op] = {}


def _settle(stem: str, asked: str | None, device: str) -> str:
    """Choose, load, and remember."""
    choice = choose(stem, asked, device)
    if choice.backend in DEVICE_OF:
        try:
            _extensions.extension(stem, choice.backend).load()
        except JitopsError as error:
            choice = without(stem, choice.backend, asked, str(error), error)
    if choice.refused:
        warnings.warn(
            f"{stem} runs on the pure-torch path, since {choice.refused}. "
            f"JITOPS_BACKEND=torch asks for that path and silences this",
            BackendWarning,
            stacklevel=3,
        )
    _ops[stem]._chosen[asked, device] = choice.backend
    return choice.backend


# torch.compile runs it while tracing and takes the result as a constant. The mark is what
# torch.compiler.assume_constant_result sets; calling that would import all of torch._dynamo.
_settle._dynamo_marked_constant = True  # type: ignore[attr-defined]


def choose(stem: str, asked: str | None, device: str) -> Choice:
    """The first candidate, before anything is looked up, built or loaded.

    Raises:
        BackendUnavailableError: the one asked for does not serve tensors on ``device``.
    """
    settings = _config.settings()
    if settings.force_cpu:
        return Choice("torch", "JITOPS_FORCE_CPU=1")
    by = f"use_backend({asked!r})" if asked else f"JITOPS_BACKEND={settings.backend}"
    wanted = asked or settings.backend
    if wanted == "torch":
        return Choice("torch", by)
    if wanted == "auto":
        if device == "cuda":
            return Choice("cuda", "auto prefers it for cuda tensors")
        return Choice("torch", f"auto takes the pure-torch path for {device} tensors")
    if device != DEVICE_OF[wanted]:
        raise BackendUnavailableError(
            f"{stem}: back end {wanted!r} was asked for ({by}) and serves "
            f"{DEVICE_OF[wanted]} tensors, got {device} tensors"
        )
    return Choice(wanted, by)


def without(
    stem: str, backend: str, asked: str | None, problem: str, cause: Exception | None = None
) -> Choice:
    """The choice when ``backend`` cannot run: the pure-torch path, where falling back is allowed.

    Raises:
        BackendUnavailableError: it is not.
    """
    settings = _config.settings()
    if (asked or settings.backend) != "auto":
        raise BackendUnavailableError(
            f"{stem}: back end {backend!r} was asked for and cannot run: {problem}"
        ) from cause
    if settings.strict:
        raise BackendUnavailableError(
            f"{stem}: JITOPS_STRICT=1 forbids falling back from {backend!r}: {problem}"
        ) from cause
    refused = f"{backend} cannot run: {problem}"
    return Choice("torch", f"auto falls back: {refused}", refused)


def problem_with(stem: str, backend: str) -> str | None:
    """Why a compiled back end cannot run here; ``None`` when it is built, or seems buildable.

    Builds and loads nothing.
    """
    try:
        if _extensions.extension(stem, backend).find() is None:
            _toolchain.check(with_cuda=backend == "cuda")
    except JitopsError as error:
        return str(error)
    if backend == "cuda" and not _hardware.has_gpu():
        return "torch sees no GPU"
    return None
