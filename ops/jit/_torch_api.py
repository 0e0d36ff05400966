"""The public functions: torch's own signatures, on this cache, and the two that only describe."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from ops._errors import ArgumentError, boundary
from ops.jit import _build_directory, _spec
from ops.jit._extension import Extension
from ops.jit._spec import Spec

Path = str | os.PathLike[str]
Paths = Path | Sequence[Path]
Flags = Sequence[str] | None
Texts = str | Sequence[str]
Functions = str | Sequence[str] | Mapping[str, str] | None

# torch's own functions, while ours are in their place.
_originals: dict[str, Any] = {}


def files(
    name: str,
    sources: Paths,
    extra_cflags: Flags = None,
    extra_cuda_cflags: Flags = None,
    extra_ldflags: Flags = None,
    extra_include_paths: Sequence[Path] | None = None,
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
    return Extension(_spec_of(locals()))


def text(
    name: str,
    cpp_sources: Texts,
    cuda_sources: Texts | None = None,
    functions: Functions = None,
    extra_cflags: Flags = None,
    extra_cuda_cflags: Flags = None,
    extra_ldflags: Flags = None,
    extra_include_paths: Sequence[Path] | None = None,
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
    return Extension(_spec_of(locals()))


@boundary
def load(
    name: str,
    sources: Paths,
    extra_cflags: Flags = None,
    extra_cuda_cflags: Flags = None,
    extra_sycl_cflags: Flags = None,
    extra_ldflags: Flags = None,
    extra_include_paths: Sequence[Path] | None = None,
    build_directory: Path | None = None,
    verbose: bool = False,
    with_cuda: bool | None = None,
    with_sycl: bool | None = None,
    is_python_module: bool = True,
    is_standalone: bool = False,
    keep_intermediates: bool = True,
) -> Any:
    """Build an extension of source files, or take it from the cache, and load it.

    The arguments are those of :func:`torch.utils.cpp_extension.load`, in the same order and with
    the same meaning, except as said here and at :func:`files`. Neither they nor the environment
    are changed. A source that has changed is built anew, and replaces the code that was loaded.

    Args:
        extra_sycl_cflags, with_sycl: must be empty, because SYCL cannot be built.
        build_directory: gets a copy of the library. A file of its name is written over only if
            this loader, or torch's, wrote it. The library that is loaded is the cache's.
        with_cuda: whether to compile and link with CUDA; ``None``: if there are CUDA sources.
        is_standalone: build a program, and load nothing.
        keep_intermediates: of no effect, as in torch without ROCm.

    Returns:
        The module; if it is none, the path of the program, or of the library that was loaded, so
        that to load it again does nothing.

    Raises:
        ArgumentError, ArgumentTypeError: an argument is unusable, or cannot be honoured.
        BuildError, CacheError: as :meth:`ops.jit.Extension.load`.
    """
    return _load(_spec_of(locals()), build_directory, verbose)


@boundary
def load_inline(
    name: str,
    cpp_sources: Texts,
    cuda_sources: Texts | None = None,
    sycl_sources: Texts | None = None,
    functions: Functions = None,
    extra_cflags: Flags = None,
    extra_cuda_cflags: Flags = None,
    extra_sycl_cflags: Flags = None,
    extra_ldflags: Flags = None,
    extra_include_paths: Sequence[Path] | None = None,
    build_directory: Path | None = None,
    verbose: bool = False,
    with_cuda: bool | None = None,
    with_sycl: bool | None = None,
    is_python_module: bool = True,
    with_pytorch_error_handling: bool = True,
    keep_intermediates: bool = True,
    use_pch: bool = False,
    no_implicit_headers: bool = False,
) -> Any:
    """Build an extension of source text, or take it from the cache, and load it.

    The arguments are those of :func:`torch.utils.cpp_extension.load_inline`, in the same order and
    with the same meaning, except as said here, at :func:`text` and at :func:`load`.

    Args:
        sycl_sources: must be empty, because SYCL cannot be built.
        use_pch: of no effect, because ``JITOPS_PCH`` decides about precompiled headers.
    """
    return _load(_spec_of(locals()), build_directory, verbose)


def _spec_of(arguments: Mapping[str, Any]) -> Spec:
    """Make a spec of the arguments of a function above; its fields have their names."""
    for name, value in arguments.items():
        if "sycl" in name and value:
            raise ArgumentError(f"{name} must be empty: jitops does not build SYCL, got {value!r}")
    fields = (field.name for field in dataclasses.fields(Spec))
    return Spec(**{name: arguments[name] for name in fields if name in arguments})


def _load(spec: Spec, build_directory: Path | None, verbose: bool) -> ModuleType | str:
    copy = None
    if build_directory is not None:
        copy = _build_directory.prepare(_spec.path("build_directory", build_directory), spec)
    extension = Extension(spec)
    loaded = extension.load(verbose=verbose)
    if copy:
        _build_directory.fill(extension.build(), copy, is_standalone=spec.is_standalone)
        # A library's copy may be another file than the one that is loaded. To load it too would
        # register its operators twice, which ends the process.
        loaded = copy if spec.is_standalone else loaded
    return loaded if isinstance(loaded, ModuleType) else str(loaded)


def install() -> None:
    """Have ``torch.utils.cpp_extension`` load through this cache, for packages that call it.

    Packages that have imported the functions by name before keep torch's.
    """
    from torch.utils import cpp_extension

    for function in (load, load_inline):
        name = function.__name__
        _originals.setdefault(name, getattr(cpp_extension, name))
        setattr(cpp_extension, name, function)


def uninstall() -> None:
    """Give ``torch.utils.cpp_extension`` its own functions back."""
    from torch.utils import cpp_extension

    for name, original in _originals.items():
        if getattr(cpp_extension, name) in (load, load_inline):  # and not somebody else's
            setattr(cpp_extension, name, original)
    _originals.clear()
