"""jitops: custom losses and ops for PyTorch, compiled on first use and cached.

``import ops`` is light: it compiles nothing and does not touch CUDA. The first use of a name
imports the module of the op. The first call that needs a compiled back end builds or loads its
extension. Without a GPU the pure-torch path runs by default, and nothing is compiled.
"""

from __future__ import annotations

import os

import lazy_loader

from ops import _operators

__version__ = "0.1.0"
_IS_JITOPS = True  # and not the package of another project

# __init__.pyi lists the public names.
_attribute, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> object:
    try:
        return _attribute(name)
    except Exception as error:
        from ops._errors import JitopsError

        if not isinstance(error, JitopsError):
            raise
        # An error of the settings or of a build. The frames of imports help nobody.
        raise error.with_traceback(None) from error.__cause__


_operators.install()

if os.path.exists(os.path.join(__path__[0], "charm.py")):  # of the namesake that is known
    import warnings

    from ops._namesake import FIX

    warnings.warn(f"another project's package ops is in {__path__[0]} too: {FIX}", stacklevel=2)
