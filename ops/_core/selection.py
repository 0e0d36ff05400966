"""Which back end is asked for, and what that means.

============  ==============================  ===========================================
asked for     tensors on                      runs
============  ==============================  ===========================================
``auto``      a CUDA device                   ``cuda``; if it cannot, ``torch``, with one
                                              warning (an error under ``JITOPS_STRICT=1``)
``auto``      any other device                ``torch``; nothing is compiled
``compiled``  the CPU or a CUDA device        ``cpp`` or ``cuda``; if it cannot, as ``auto``
``compiled``  any other device                ``torch``
``torch``     any device                      ``torch``
``cpp``       the CPU                         ``cpp``, or an error
``cuda``      a CUDA device                   ``cuda``, or an error
============  ==============================  ===========================================
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ops import _config
from ops._errors import ConfigError, did_you_mean

DEVICE_OF = {"cpp": "cpu", "cuda": "cuda"}  # a compiled back end serves one kind of device
BACKEND_OF = {device: backend for backend, device in DEVICE_OF.items()}
MAY_FALL_BACK = ("auto", "compiled")  # requests that name no back end


def has_gpu() -> bool:
    """Whether torch could use a CUDA device. Asks NVML, which leaves CUDA uninitialised."""
    return torch.version.cuda is not None and torch.cuda.device_count() > 0


class _Request:
    """What :func:`use_backend` has asked for; ``None``: ``JITOPS_BACKEND`` decides.

    An attribute, so that :func:`torch.compile` guards on it: a graph compiled for one back end is
    not used when another is asked for.
    """

    backend: str | None = None


request = _Request()


@contextlib.contextmanager
def use_backend(backend: _config.Backend) -> Iterator[None]:
    """Ask for a back end within a ``with`` block, in place of ``JITOPS_BACKEND``.

    Holds for the whole process, as torch's own back-end flags do: not for threads that ask for
    different ones at once. The backward pass runs on the back end that its forward pass ran on.

    Args:
        backend: ``auto``, ``torch``, ``cpp``, ``cuda`` or ``compiled``.

    Raises:
        ConfigError: no such back end, or ``JITOPS_FORCE_CPU`` forbids it.
    """
    try:
        _config.backend_name(backend)
    except ValueError:
        raise ConfigError(
            f"backend must be one of {', '.join(_config.BACKENDS)}, got {backend!r}"
            f"{did_you_mean(str(backend), _config.BACKENDS)}"
        ) from None
    if backend in _config.COMPILED and _config.settings().force_cpu:
        raise ConfigError(f"use_backend({backend!r}) contradicts JITOPS_FORCE_CPU: unset it")
    before = request.backend
    request.backend = backend
    try:
        yield
    finally:
        request.backend = before


def requested() -> str | None:
    """What the innermost :func:`use_backend` asks for."""
    return request.backend


@dataclass(frozen=True)
class Choice:
    """A back end and why it is the one; ``refused`` says why a preferred one is not."""

    backend: str
    reason: str
    refused: str | None = None
