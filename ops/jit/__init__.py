"""Compile C++ and CUDA when first needed, and keep the result for good.

:class:`Extension` is the loader that the built-in ops use; :func:`files` and :func:`text` make one,
for ops of your own. :func:`load` and :func:`load_inline` take the place of their namesakes in
:mod:`torch.utils.cpp_extension`: same arguments, same results. :func:`install` puts them there, for
packages that call torch's. Nothing here knows of any op.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ops.jit import _spec
from ops.jit._extension import Extension
from ops.jit._spec import Spec
from ops.jit._torch_api import install, load, load_inline, uninstall

__all__ = ["Extension", "Spec", "files", "install", "load", "load_inline", "text", "uninstall"]


def files(
    name: str,
    sources: str | Path | Sequence[str | Path],
    extra_cflags: Sequence[str] | None = None,
    extra_cuda_cflags: Sequence[str] | None = None,
    extra_ldflags: Sequence[str] | None = None,
    extra_include_paths: Sequence[str | Path] | None = None,
    *,
    is_python_module: bool = True,
) -> Extension:
    """Describe an extension of source files; nothing is built yet.

    Args:
        name: a C identifier; the module's name, and ``TORCH_EXTENSION_NAME`` in the sources.
            A library that is no module may have any name of letters, digits and ``_.+-``.
        sources: C++ and CUDA files, assembly included.
        extra_cflags, extra_ldflags: flags for the C++ compiler, and for the linker.
        extra_cuda_cflags: flags for nvcc. Without an architecture among them,
            ``TORCH_CUDA_ARCH_LIST`` or the GPUs of this machine decide.
        extra_include_paths: folders of headers; a header below them that changes means a rebuild.
        is_python_module: ``False`` for a library that registers operators with torch.

    Raises:
        ArgumentError, ArgumentTypeError: an argument is unusable.
    """
    spec = Spec(
        name=name,
        sources=_spec.paths("sources", sources),
        extra_cflags=_spec.flags("extra_cflags", extra_cflags),
        extra_cuda_cflags=_spec.flags("extra_cuda_cflags", extra_cuda_cflags),
        extra_ldflags=_spec.flags("extra_ldflags", extra_ldflags),
        extra_include_paths=_spec.paths("extra_include_paths", extra_include_paths),
        is_python_module=is_python_module,
    )
    return Extension(spec)


def text(
    name: str,
    cpp_sources: str | Sequence[str],
    cuda_sources: str | Sequence[str] | None = None,
    functions: str | Sequence[str] | Mapping[str, str] | None = None,
    extra_cflags: Sequence[str] | None = None,
    extra_cuda_cflags: Sequence[str] | None = None,
    extra_ldflags: Sequence[str] | None = None,
    extra_include_paths: Sequence[str | Path] | None = None,
    *,
    is_python_module: bool = True,
    no_implicit_headers: bool = False,
) -> Extension:
    """Describe an extension of source text; nothing is built yet.

    Args:
        cpp_sources: C++ text. Error messages count its lines as given.
        cuda_sources: CUDA text.
        functions: names of functions to bind with pybind11, or names with docstrings.
        no_implicit_headers: do not include ``torch/extension.h``, which takes some twenty seconds
            to compile; text on the stable ABI (``torch/csrc/stable``) needs one.

    The other arguments and the errors are those of :func:`files`.
    """
    spec = Spec(
        name=name,
        cpp_sources=_spec.texts("cpp_sources", cpp_sources),
        cuda_sources=_spec.texts("cuda_sources", cuda_sources or None),
        functions=_spec.bindings(functions),
        extra_cflags=_spec.flags("extra_cflags", extra_cflags),
        extra_cuda_cflags=_spec.flags("extra_cuda_cflags", extra_cuda_cflags),
        extra_ldflags=_spec.flags("extra_ldflags", extra_ldflags),
        extra_include_paths=_spec.paths("extra_include_paths", extra_include_paths),
        is_python_module=is_python_module,
        no_implicit_headers=no_implicit_headers,
    )
    return Extension(spec)
