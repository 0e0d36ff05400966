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


class JitopsError(Exception):
    """The base class of every error that jitops raises on purpose."""


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
