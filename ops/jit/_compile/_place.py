"""A folder to build in, under a path that ninja, the compilers and the shell take as it is."""

from __future__ import annotations

import contextlib
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ops._errors import BuildError
from ops.jit import _spec


@contextlib.contextmanager
def plain(folder: Path) -> Iterator[Path]:
    """``folder`` itself, or a link to it from a place without spaces, quotes and the like.

    Raises:
        BuildError: there is no such place.
    """
    if _is_plain(folder):
        yield folder
        return
    bases = [Path(tempfile.gettempdir()), Path("/tmp")]
    base = next(filter(_is_plain, bases), None)
    if base is None:
        odd = sorted(_spec.ODD & set(str(folder)))
        if odd:
            raise BuildError(
                f"{folder}: its path has {' '.join(odd)!r}, which ninja cannot pass on, and so has "
                f"the folder for temporary files: set JITOPS_CACHE_DIR or TMPDIR to one without"
            )
        yield folder  # spaces and accents are passed on
        return
    outer = Path(tempfile.mkdtemp(prefix="jitops-", dir=base))
    try:
        (outer / "build").symlink_to(folder, target_is_directory=True)
        yield outer / "build"
    finally:
        shutil.rmtree(outer, ignore_errors=True)


def _is_plain(folder: Path) -> bool:
    return shlex.quote(str(folder)) == str(folder) and ":" not in str(folder) and folder.is_dir()
