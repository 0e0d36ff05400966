"""``build_directory``: it gets the library, and no file is written over that no loader has written.

For each library that is written, ``.jitops`` in the same folder gets an empty file that is named by
the library and its digest. So a file that somebody else writes or edits stays as it is.
"""

import contextlib
import os
import stat
import tempfile
from pathlib import Path

from ops._errors import ArgumentError, CacheError
from ops.jit._cache import _entries
from ops.jit._spec import Spec


def prepare(folder: Path, spec: Spec) -> Path:
    """Make the folder before anything is built for it; return where the library will be."""
    try:
        (folder / ".jitops").mkdir(parents=True, exist_ok=True)
        if (folder / ".jitops").is_symlink():
            raise NotADirectoryError(".jitops is a link")
    except OSError as error:
        raise ArgumentError(
            f"build_directory must be a folder that is there or can be made, and can have a folder "
            f".jitops, got {folder}: {error}"
        ) from error
    target = folder / (spec.name if spec.is_standalone else f"{spec.name}.so")
    _check(target)
    return target


def fill(library: Path, target: Path, *, is_standalone: bool) -> None:
    """Put a library or a program at ``target``, in one rename and through no link."""
    try:
        _check(target)
        content = library.read_bytes()
        is_same = target.exists() and (is_standalone or target.samefile(library))
        if is_same and target.read_bytes() == content:
            return
        os.close(os.open(_mark(target, content), os.O_CREAT | os.O_NOFOLLOW, 0o644))
        # In a folder whose name nobody can foresee, and in which nobody else can write.
        with tempfile.TemporaryDirectory(prefix=".jitops-", dir=target.parent) as folder:
            draft = Path(folder, target.name)
            if not is_standalone:  # the same file as the cache's, so that to load it does nothing
                with contextlib.suppress(OSError):  # not across file systems
                    os.link(library, draft)
            if not draft.exists():
                draft.write_bytes(content)
                draft.chmod(0o755)
            os.replace(draft, target)
    except OSError as error:
        raise CacheError(f"{library} cannot be copied to {target}: {error}") from error


def _check(path: Path) -> None:
    """Refuse a file that neither this loader nor torch's has written, or that is no plain file."""
    more = ""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):  # to open a special file may block
            more = ", which is no plain file"
        elif _mark(path, path.read_bytes()).exists() or _is_torchs(path):
            return
    except FileNotFoundError:
        return
    except OSError as error:
        more = f", which cannot be read: {error}"
    raise ArgumentError(
        f"build_directory must have no {path.name} but one that the loader wrote, got "
        f"{path}{more}: move or delete it, or name another folder"
    )


def _mark(path: Path, content: bytes) -> Path:
    return path.parent / ".jitops" / f"{path.name}-{_entries.sha256(content)}"


def _is_torchs(path: Path) -> bool:
    """Whether torch's own loader has linked a library, and nobody has edited it since."""
    script, log = path.parent / "build.ninja", path.parent / ".ninja_log"
    return (
        script.is_file()
        and log.is_file()
        and f"build {path.name}: link".encode() in script.read_bytes()
        and path.stat().st_mtime_ns <= log.stat().st_mtime_ns
    )
