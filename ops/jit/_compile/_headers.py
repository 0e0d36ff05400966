"""Which headers went into a build, and which of them are the extension's own."""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path

import torch

from ops._errors import BuildError
from ops.jit._compile import _ninja, _toolchain
from ops.jit._spec import Spec


def read_by(spec: Spec, folder: Path) -> list[Path]:
    """The headers that the compilers really read and nobody vouches for, as they named them.

    Raises:
        BuildError: a name cannot be understood, so that nobody could tell when the file changes.
    """
    named = {
        Path(os.path.join(folder, name))
        for names in _ninja.dependencies(folder).values()
        for name in names
    }
    vouched = _vouched()
    roots = [root for root in spec.header_roots if root.resolve() not in vouched]
    sources = {path.resolve() for path in spec.sources}
    inner, found = folder.resolve(), []
    for path in sorted(named):
        resolved = path.resolve()
        if resolved in sources or path.is_relative_to(folder) or resolved.is_relative_to(inner):
            continue
        if not path.is_file():
            raise BuildError(
                f"{spec.name}: the compiler read a header whose name ninja cannot pass on, cut to "
                f"{str(path)!r}: a header's path must be of ordinary characters",
                passing=False,
            )
        own = any(path.is_relative_to(root) for root in roots)
        if own or not any(resolved.is_relative_to(place) for place in vouched):
            found.append(path)
    return found


def _vouched() -> list[Path]:
    """Folders whose headers the identity of torch, nvcc or the compiler vouches for."""
    home, compiler = _toolchain.cuda_home(), _toolchain.cxx()
    places = [Path(torch.__file__).parent, Path(sysconfig.get_path("include"))]
    places += [Path("/usr/include"), Path("/usr/lib"), Path("/usr/lib64")]
    if sys.platform == "darwin":
        places += [Path("/Library/Developer"), Path("/Applications/Xcode.app")]
    if compiler:  # one of conda, say, has its own headers below its prefix, beside users' ones
        prefix = compiler.path.parent.parent
        places += [prefix / "lib", prefix / "include" / "c++", *prefix.glob("*-*-*")]
    return [place.resolve() for place in [*places, *([home] if home else [])]]
