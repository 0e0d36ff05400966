"""Every error jitops raises on purpose.

::

    JitopsError
     ├── ArgumentError                   (also ValueError)   a value, shape, device or layout
     ├── ArgumentTypeError               (also TypeError)    a Python type or a dtype
     ├── GradientError                   (also RuntimeError) a gradient that cannot be had
     ├── DependencyError                 (also ImportError)  an optional package is not installed
     ├── GradientCheckError              (also AssertionError) a checked gradient is wrong
     ├── ConfigError                     (also ValueError)   a JITOPS_* variable, a back-end request
     ├── BackendUnavailableError         (also RuntimeError) the asked-for back end cannot run here
     ├── BuildError                      (also RuntimeError) an extension did not build or load
     │    ├── ToolchainError             no usable compiler, ninja, nvcc or architecture
     │    ├── ModuleLoadError            (also ImportError) a built module does not load
     │    ├── LibraryLoadError           (also OSError) a built operator library does not load
     │    ├── BuildTimeoutError          another process has been building it for too long
     │    └── NotBuiltError              it is not built yet, and JITOPS_BUILD=never
     ├── BundleError                     (also OSError)      a bundle cannot be read or written
     └── CacheError                      (also OSError)      no cache directory can be used

Each also derives from the built-in error that tensor code would raise, so that an ``except
ValueError`` written for :mod:`torch` goes on working.
"""

from __future__ import annotations


class JitopsError(Exception):
    """Base of every error jitops raises on purpose."""


class ArgumentError(JitopsError, ValueError):
    """An argument has an unusable value, shape, device or layout."""


class ArgumentTypeError(JitopsError, TypeError):
    """An argument has an unusable Python type or dtype."""


class GradientError(JitopsError, RuntimeError):
    """A gradient was asked for that there is no way to compute."""


class GradientCheckError(JitopsError, AssertionError):
    """A gradient check failed; the message is its report."""


class DependencyError(JitopsError, ImportError):
    """An optional package that an op needs is not installed."""


class ConfigError(JitopsError, ValueError):
    """A ``JITOPS_*`` variable or a back-end request cannot be understood, or two contradict."""


class BackendUnavailableError(JitopsError, RuntimeError):
    """The back end that was asked for cannot run here."""


class BuildError(JitopsError, RuntimeError):
    """An extension did not build, or was built and did not load.

    Attributes:
        log: path of the whole build log, or ``None`` when nothing was run.
    """

    def __init__(self, message: str, log: str | None = None) -> None:
        super().__init__(message)
        self.log = log


class ToolchainError(BuildError):
    """A tool the build needs is missing, or does not fit the installed torch."""


class ModuleLoadError(BuildError, ImportError):
    """An extension was built, and does not load as a Python module."""


class LibraryLoadError(BuildError, OSError):
    """An extension was built, and does not load as a library of operators."""


class BuildTimeoutError(BuildError):
    """Another process has been building the same extension for too long."""


class NotBuiltError(BuildError):
    """An extension is not in the cache, and ``JITOPS_BUILD=never`` forbids to build it."""


class CacheError(JitopsError, OSError):
    """No directory can be used as the cache."""


class BundleError(JitopsError, OSError):
    """A bundle cannot be written, read or trusted, or is damaged."""


class BackendWarning(UserWarning):
    """The back end ``auto`` prefers cannot run, and the pure-torch path runs instead."""


class CacheWarning(UserWarning):
    """The configured cache directory cannot be used, and another one is used instead."""


class GradientCheckWarning(UserWarning):
    """A gradient check cannot tell whether a gradient is right, because rounding hides it."""


class ConfigWarning(UserWarning):
    """A ``JITOPS_*`` variable is set that jitops does not know."""
