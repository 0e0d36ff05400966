"""Every error that jitops raises on purpose.

::

    JitopsError
     ├── ArgumentError                   (also ValueError)   a value, shape, device or layout
     ├── ArgumentTypeError               (also TypeError)    a Python type or a dtype
     ├── GradientError                   (also RuntimeError) a gradient that cannot be computed
     ├── DependencyError                 (also ImportError)  an optional package is not installed
     ├── GradientCheckError              (also AssertionError) a checked gradient is wrong
     ├── ConfigError                     (also ValueError)   a JITOPS_* variable, a back-end request
     ├── BackendUnavailableError         (also RuntimeError) the requested back end cannot run here
     ├── BuildError                      (also RuntimeError) an extension did not build or load
     │    ├── ToolchainError             no usable compiler, ninja, nvcc or architecture
     │    ├── ModuleLoadError            (also ImportError) a built module does not load
     │    ├── LibraryLoadError           (also OSError) a built operator library does not load
     │    ├── BuildTimeoutError          another process has been building it for too long
     │    └── NotBuiltError              it is not in the cache, and JITOPS_BUILD=never
     ├── BundleError                     (also OSError)      a bundle cannot be read or written
     └── CacheError                      (also OSError)      no cache directory can be used

Each also derives from the built-in error that tensor code would raise. So an ``except ValueError``
written for :mod:`torch` still works.
"""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import ParamSpec, TypeVar

    P = ParamSpec("P")
    R = TypeVar("R")

# The frames between a user's call and the line that raises are in these packages.
_INNER = ("ops", "torch", "contextlib", "importlib", "lazy_loader")
_MEANT = {"avg": "mean", "average": "mean", "c++": "cpp", "gpu": "cuda"}


class JitopsError(Exception):
    """The base class of every error that jitops raises on purpose."""

    def _render_traceback_(self) -> list[str]:
        """The traceback that IPython shows. It ends where the user's code calls jitops."""
        from IPython import get_ipython

        outer = _until_the_call(self.__traceback__)
        show = get_ipython().InteractiveTB.structured_traceback
        lines: list[str] = show(type(self), self, outer, tb_offset=1)
        return lines


def _until_the_call(traceback: TracebackType | None) -> TracebackType | None:
    """A copy without the frames below the user's last one."""
    frames = []
    while traceback:
        frames.append(traceback)
        traceback = traceback.tb_next
    while len(frames) > 1 and _is_inner(frames[-1]):
        frames.pop()
    for one in reversed(frames):
        traceback = TracebackType(traceback, one.tb_frame, one.tb_lasti, one.tb_lineno)
    return traceback


def _is_inner(traceback: TracebackType) -> bool:
    module = str(traceback.tb_frame.f_globals.get("__name__"))
    return module.partition(".")[0] in _INNER


def boundary(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a public function, at which the traceback of an error of ours ends."""
    import functools

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except JitopsError as error:
            raise error.with_traceback(None) from error.__cause__

    return call


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """The end of a message about an unknown word; empty if no allowed word is like it."""
    import difflib

    words = {word.lower(): word for word in allowed}
    given = given.lower()
    close = [_MEANT[given]] if _MEANT.get(given) in words else []
    close += difflib.get_close_matches(given, words, 1)
    return f"; did you mean {words[close[0]]!r}?" if close else ""


class ArgumentError(JitopsError, ValueError):
    """An argument has an unusable value, shape, device or layout."""


class ArgumentTypeError(JitopsError, TypeError):
    """An argument has an unusable Python type or dtype."""


class GradientError(JitopsError, RuntimeError):
    """The requested gradient cannot be computed."""


class GradientCheckError(JitopsError, AssertionError):
    """A gradient check found a wrong gradient; the message is its report."""


class DependencyError(JitopsError, ImportError):
    """An optional package that an op needs is not installed."""


class ConfigError(JitopsError, ValueError):
    """A ``JITOPS_*`` variable or a back-end request is invalid, or two of them contradict."""


class BackendUnavailableError(JitopsError, RuntimeError):
    """The requested back end cannot run here."""


class BuildError(JitopsError, RuntimeError):
    """An extension failed to build, or to load after it was built.

    Attributes:
        log: path of the whole build log, or ``None`` if no tool was run.
    """

    def __init__(self, message: str, log: str | None = None) -> None:
        super().__init__(message)
        self.log = log


class ToolchainError(BuildError):
    """A tool that the build needs is missing, or does not fit the installed torch."""


class ModuleLoadError(BuildError, ImportError):
    """An extension was built, but does not load as a Python module."""


class LibraryLoadError(BuildError, OSError):
    """An extension was built, but does not load as a library of operators."""


class BuildTimeoutError(BuildError):
    """Another process has been building the same extension for too long."""


class NotBuiltError(BuildError):
    """An extension is not in the cache, and ``JITOPS_BUILD=never`` forbids building it."""


class CacheError(JitopsError, OSError):
    """No directory is usable as the cache."""


class BundleError(JitopsError, OSError):
    """A bundle cannot be written, read or trusted, or is damaged."""


class BackendWarning(UserWarning):
    """The back end that ``auto`` prefers cannot run, so the pure-torch path runs instead."""


class CacheWarning(UserWarning):
    """The configured cache directory cannot be used, so another one is used instead."""


class GradientCheckWarning(UserWarning):
    """A gradient check cannot tell whether a gradient is right, because rounding hides it."""


class ConfigWarning(UserWarning):
    """A ``JITOPS_*`` environment variable is unknown to jitops."""
