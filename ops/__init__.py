"""jitops: custom losses and ops for PyTorch, compiled when first used, cached for good.

``import ops`` is light: nothing is compiled, CUDA is not touched. An op's module is imported when
its name is first used, and what a compiled back end needs is built or loaded then. Without a GPU
the pure-torch path runs and nothing is compiled at all.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Module -> what it gives to the public. An op adds its line here and below, and files of its own.
_PUBLIC = {
    "improved_triplet_loss": ("ImprovedTripletLoss", "TripletLossFunc", "improved_triplet_loss"),
    "lltm": ("LLTM", "LLTMFunction", "LLTMState", "lltm", "lltm_sequence"),
    "linear": ("LinearFunction", "linear"),
    "normalize_with_norm": (
        "DirectionAndNorm",
        "NormalizeWithNormFunction",
        "normalize_with_norm",
    ),
    "from_numpy": ("NumpyOp", "from_numpy"),
    "rfft2_magnitude": ("rfft2_magnitude",),
    "scipy_conv2d": ("ScipyConv2d", "scipy_conv2d"),
    "hausdorff_dt_loss": ("HausdorffDTLoss", "hausdorff_dt_loss"),
    "set_matching_loss": ("SetMatching", "SetMatchingLoss", "set_matching_loss"),
    "check_gradients": ("GradientReport", "check_gradients"),
    "_backend": ("use_backend",),
    "_op": ("Op",),
    "_explain": ("explain",),
    "_errors": (
        "ArgumentError",
        "ArgumentTypeError",
        "BackendUnavailableError",
        "BackendWarning",
        "BuildError",
        "BuildTimeoutError",
        "BundleError",
        "CacheError",
        "CacheWarning",
        "ConfigError",
        "ConfigWarning",
        "DependencyError",
        "GradientCheckError",
        "GradientCheckWarning",
        "GradientError",
        "JitopsError",
        "NotBuiltError",
        "ToolchainError",
    ),
}
_EXPORTS = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = sorted([*_EXPORTS, "jit"])  # noqa: PLE0605

if TYPE_CHECKING:
    from ops import jit as jit
    from ops._backend import use_backend as use_backend
    from ops._errors import *  # noqa: F403
    from ops._explain import explain as explain
    from ops._op import Op as Op
    from ops.check_gradients import *  # noqa: F403
    from ops.from_numpy import *  # noqa: F403
    from ops.hausdorff_dt_loss import *  # noqa: F403
    from ops.improved_triplet_loss import *  # noqa: F403
    from ops.linear import *  # noqa: F403
    from ops.lltm import *  # noqa: F403
    from ops.normalize_with_norm import *  # noqa: F403
    from ops.rfft2_magnitude import *  # noqa: F403
    from ops.scipy_conv2d import *  # noqa: F403
    from ops.set_matching_loss import *  # noqa: F403


def __getattr__(name: str) -> Any:
    if name == "jit":
        return importlib.import_module("ops.jit")
    if name not in _EXPORTS:
        raise AttributeError(f"module 'ops' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"ops.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*(name for name in globals() if name.startswith("__")), *__all__})


class _Package(ModuleType):
    """Keeps ``ops.x`` the function when ``import ops.x`` binds the module of the same name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and _EXPORTS.get(name) == name:
            value = getattr(value, name, value)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
