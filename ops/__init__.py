"""jitops: custom losses and ops for PyTorch, compiled when first used, cached for good.

``import ops`` is light: it compiles nothing and does not touch CUDA. The module of an op is
imported when its name is first used. An extension that a compiled back end needs is built or loaded
then. Without a GPU the pure-torch path runs, and nothing is compiled.
"""

from __future__ import annotations

import lazy_loader

__version__ = "0.1.0"

# The public names stand in __init__.pyi.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
