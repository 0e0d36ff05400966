"""Compile C++ and CUDA when first needed, and keep the result for good.

:class:`Extension` is the loader that the built-in ops use; :func:`files` and :func:`text` make one,
for ops of your own. :func:`load` and :func:`load_inline` take the place of their namesakes in
:mod:`torch.utils.cpp_extension`: same arguments, same results. :func:`install` puts them there, for
packages that call torch's. Nothing here knows of any op.
"""

from ops.jit._extension import Extension
from ops.jit._spec import Spec
from ops.jit._torch_api import files, install, load, load_inline, text, uninstall

__all__ = ["Extension", "Spec", "files", "install", "load", "load_inline", "text", "uninstall"]
