"""``load`` and ``load_inline``: torch's own signatures and behaviour, on our cache."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from types import ModuleType

from ops._errors import ArgumentError
from ops.jit import _build_directory, _spec
from ops.jit._extension import Extension
from ops.jit._spec import Spec

Paths = str | os.PathLike[str]


def load(
    name: str,
    sources: Paths | Sequence[Paths],
    extra_cflags: Sequence[str] | None = None,
    extra_cuda_cflags: Sequence[str] | None = None,
    extra_sycl_cflags: Sequence[str] | None = None,
    extra_ldflags: Sequence[str] | None = None,
    extra_include_paths: Sequence[Paths] | None = None,
    build_directory: Paths | None = None,
    verbose: bool = False,
    with_cuda: bool | None = None,
    with_sycl: bool | None = None,
    is_python_module: bool = True,
    is_standalone: bool = False,
    keep_intermediates: bool = True,
) -> ModuleType | str:
    """Build an extension of source files, or take it from the cache, and load it.

    Takes what :func:`torch.utils.cpp_extension.load` takes, in the same order, and does the same
    with it, but for what is said here. The arguments are not changed, nor is the environment.

    Args:
        name: a C identifier; the module's name, and ``TORCH_EXTENSION_NAME`` in the sources.
            Of what is no module, any name that files can have of letters, digits and ``_.+-``.
        sources: ``.cpp`` and ``.cu`` files. One that has changed since is built anew, and takes the
            place of what was loaded.
        extra_cflags, extra_cuda_cflags, extra_ldflags: flags, as the shell would split them.
        extra_sycl_cflags, with_sycl: SYCL cannot be built.
        extra_include_paths: folders of headers; a header below them that changes means a rebuild.
        build_directory: also put there, in the end: the library, ``compile_commands.json``, and the
            sources of text (``main.cpp``, ``cuda.cu``), which are written over files of those names
            only if the loader wrote them. What is loaded is in the cache: the copy of a library is
            for other processes.
        verbose: say what is done, and pass on what the compilers say.
        with_cuda: whether to compile and link with CUDA; ``None``: if there are CUDA sources.
        is_python_module: ``False`` for a library that registers operators with torch.
        is_standalone: build a program, and load nothing.
        keep_intermediates: of no effect, as in torch without ROCm.

    Returns:
        The module; if it is none, the path of the program, or of the library that was loaded, so
        that to load it again does nothing.

    Raises:
        ArgumentError, ArgumentTypeError: an argument is unusable, or cannot be honoured.
        BuildError, CacheError: as :meth:`ops.jit.Extension.load`.
    """
    _refuse_sycl(extra_sycl_cflags=extra_sycl_cflags, with_sycl=with_sycl)
    spec = Spec(
        name=name,
        sources=_spec.paths("sources", sources),
        extra_cflags=_spec.flags("extra_cflags", extra_cflags),
        extra_cuda_cflags=_spec.flags("extra_cuda_cflags", extra_cuda_cflags),
        extra_ldflags=_spec.flags("extra_ldflags", extra_ldflags),
        extra_include_paths=_spec.paths("extra_include_paths", extra_include_paths),
        with_cuda=with_cuda,
        is_python_module=is_python_module,
        is_standalone=is_standalone,
    )
    return _load(spec, build_directory, verbose)


def load_inline(
    name: str,
    cpp_sources: str | Sequence[str],
    cuda_sources: str | Sequence[str] | None = None,
    sycl_sources: str | Sequence[str] | None = None,
    functions: str | Sequence[str] | Mapping[str, str] | None = None,
    extra_cflags: Sequence[str] | None = None,
    extra_cuda_cflags: Sequence[str] | None = None,
    extra_sycl_cflags: Sequence[str] | None = None,
    extra_ldflags: Sequence[str] | None = None,
    extra_include_paths: Sequence[Paths] | None = None,
    build_directory: Paths | None = None,
    verbose: bool = False,
    with_cuda: bool | None = None,
    with_sycl: bool | None = None,
    is_python_module: bool = True,
    with_pytorch_error_handling: bool = True,
    keep_intermediates: bool = True,
    use_pch: bool = False,
    no_implicit_headers: bool = False,
) -> ModuleType | str:
    """Build an extension of source text, or take it from the cache, and load it.

    Takes what :func:`torch.utils.cpp_extension.load_inline` takes, in the same order, and does the
    same with it, but for what is said here and at :func:`load`.

    Args:
        cpp_sources: C++ text. Error messages count its lines as given.
        cuda_sources: CUDA text.
        sycl_sources: SYCL cannot be built.
        functions: names of functions to bind with pybind11, or names with docstrings.
        with_pytorch_error_handling: whether torch turns their errors into Python's.
        use_pch: of no effect: ``torch/extension.h`` is precompiled unless ``JITOPS_PCH=0``, in our
            cache, never among torch's own headers.
        no_implicit_headers: do not include ``torch/extension.h``, which takes long to compile; text
            on the stable ABI (``torch/csrc/stable``) needs one second.
    """
    _refuse_sycl(
        sycl_sources=sycl_sources, extra_sycl_cflags=extra_sycl_cflags, with_sycl=with_sycl
    )
    spec = Spec(
        name=name,
        cpp_sources=_spec.texts("cpp_sources", cpp_sources),
        cuda_sources=_spec.texts("cuda_sources", cuda_sources),
        functions=_spec.bindings(functions),
        extra_cflags=_spec.flags("extra_cflags", extra_cflags),
        extra_cuda_cflags=_spec.flags("extra_cuda_cflags", extra_cuda_cflags),
        extra_ldflags=_spec.flags("extra_ldflags", extra_ldflags),
        extra_include_paths=_spec.paths("extra_include_paths", extra_include_paths),
        with_cuda=with_cuda,
        is_python_module=is_python_module,
        with_pytorch_error_handling=with_pytorch_error_handling,
        no_implicit_headers=no_implicit_headers,
    )
    return _load(spec, build_directory, verbose)


def _refuse_sycl(**arguments: object) -> None:
    for name, value in arguments.items():
        if value:
            raise ArgumentError(f"{name} must be empty: jitops does not build SYCL, got {value!r}")


def _load(spec: Spec, build_directory: Paths | None, verbose: bool) -> ModuleType | str:
    folder = None
    if build_directory is not None:
        folder = _build_directory.made(_spec.path("build_directory", build_directory), spec)
    loaded, entry = Extension(spec).load_entry(verbose=verbose)
    if folder:
        copy = _build_directory.put(spec, entry, folder)
        # A library's copy is another file than what is loaded, and would register its operators a
        # second time, which ends the process.
        loaded = copy if spec.is_standalone else loaded
    return loaded if isinstance(loaded, ModuleType) else str(loaded)
