"""Compares, at a look-up, the recorded dependencies of a build with those that are there now.

A manifest, which :mod:`ops.jit._record` makes, holds all that only a build can tell: the compilers,
the files that they read, and which names the folders had that they searched. A doubt counts as a
change, hence as a rebuild.
"""

import os
import time
from collections.abc import Iterable, Iterator
from typing import Any

from ops._errors import ToolchainError
from ops.jit._cache import _entries
from ops.jit._compile import _compilers
from ops.jit._spec import Spec

Manifest = dict[str, Any]
# The errors that come of reading a manifest that is none.
UNREADABLE = (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, OSError)
SYSTEM = ("/usr/include/", "/usr/local/include/", "/usr/lib/", "/usr/lib64/", "/lib/", "/lib64/")


def accepts(spec: Spec, digest: str, manifest: Manifest) -> bool:
    """Whether an entry serves here, for a request of this digest."""
    return manifest.get("digest") == digest and next(differences(spec, manifest), None) is None


def differences(spec: Spec, manifest: Manifest) -> Iterator[str]:
    """Yield why an entry of the same digest does not serve here."""
    try:
        yield from _of_files(spec, manifest)
        yield from _of_architectures(spec, manifest)
        yield from of_machine(manifest)
    except UNREADABLE:
        yield "its manifest cannot be read"


def _of_files(spec: Spec, manifest: Manifest) -> Iterator[str]:
    imported = bool(manifest.get("imported"))
    # Where nothing is compiled, the system's headers need not be there.
    foreign = imported or _compilers.cxx() is None
    for path, is_own, content, *recorded in _located(spec, manifest["inputs"]):
        if recorded and recorded == times(path):
            continue
        # Another machine's system, or headers that this one need not have.
        of_system = imported and path.startswith(SYSTEM)
        if not is_own and foreign and (of_system or not os.path.exists(path)):
            continue
        if digest_of(path) != content:
            yield f"{path} has changed"
    for folder, is_own, is_shadow, found in _located(spec, manifest["searched"]):
        if (is_own or not foreign) and (
            listing(folder, is_shadow, manifest["names"], manifest["exact"]) != found
        ):
            yield "a file has come or gone that may hide another"
            break
    if not imported and manifest["place"] not in (None, [str(one) for one in spec.header_roots]):
        yield "the sources have moved, and use __FILE__ or name their own folder"


def _of_architectures(spec: Spec, manifest: Manifest) -> Iterator[str]:
    if not spec.uses_cuda:
        return
    from ops.jit._compile import _gpu_archs

    try:
        needed = _gpu_archs.architectures_of(spec)
    except ToolchainError:
        return  # no GPU here, and none named: any code will do
    for one in needed:
        if not _gpu_archs.serves(manifest["architectures"], one):
            yield f"GPU architecture {one} is not in it"


def of_machine(manifest: Manifest) -> Iterator[str]:
    """Yield why an entry, of whichever extension, does not serve on this machine."""
    if _compilers.numbers(manifest["libc"]) > _compilers.numbers(libc()):
        yield f"libc {manifest['libc']} → {libc()}"
    if manifest.get("imported"):
        return  # a compiler that is here has not built it
    for kind, tool in _compilers.tools(bool(manifest["request"]["cuda"])).items():
        recorded = manifest["compilers"].get(kind)
        if tool is None or recorded is None:
            continue
        try:
            if _compilers.identity(tool) != recorded["identity"]:
                yield f"{kind}: {recorded['version']} → {_compilers.version(tool)}"
        except ToolchainError as error:  # it does not run
            yield f"{kind}: {recorded['version']} → {error}"


def changed_since(spec: Spec, manifest: Manifest, since: float) -> str | None:
    """Find an input that was edited after a time, while the compilers ran."""
    paths = [path for path, *_ in _located(spec, manifest["inputs"])]
    for folder, _, _, found in _located(spec, manifest["searched"]):
        paths += [path for one in found if os.path.isfile(path := os.path.join(folder, one))]
    # A clock ahead of ours, on a network file system, is no edit.
    now = time.time_ns()
    for path in paths:
        # A file that is moved here keeps the time of its last edit. One that is gone has none.
        _, *when, _ = times(path) or [0, now, 0]
        if any(since * 1e9 < one <= now for one in when):
            return path
    return None


def _located(spec: Spec, rows: Iterable[list[Any]]) -> Iterator[list[Any]]:
    """Turn each row's first two items, see :func:`locate`, into the path and whose it is."""
    roots = [str(root) for root in spec.header_roots]
    for number, name, *rest in rows:
        is_own = number >= 0
        yield [os.path.join(roots[number], name) if is_own else name, is_own, *rest]


def locate(spec: Spec, path: str) -> tuple[int, str]:
    """Describe a path as (number of its root, path below it), or (-1, itself) outside of all."""
    for number, root in enumerate(map(str, spec.header_roots)):
        if path == root or path.startswith(f"{root}/"):
            return number, path[len(root) + 1 :]
    return -1, path


def times(path: str) -> list[int]:
    """Return a file's size, its times of modification and change, and its number; else nothing.

    Nobody can set back the time of change. But files that were written at the same moment have the
    same, and a link may lead to another of them.
    """
    try:
        status = os.stat(path)
    except OSError:
        return []
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def digest_of(path: str) -> str:
    """Return the digest of a file's content."""
    try:
        return _entries.digest_of(path)[:40]
    except OSError:
        return "missing"


def listing(folder: str, is_shadow: bool, names: Iterable[str], exact: Iterable[str]) -> list[str]:
    """List which of these paths a folder has, the many ``names`` only if it is a shadow.

    A shadow is a folder in which a new file may hide another.
    """
    present = names_in(folder) if is_shadow else set()
    sought = [*exact, *(name for name in names if name.partition("/")[0] in present)]
    found = {name: path for name in sought if os.path.exists(path := os.path.join(folder, name))}
    # A folder hides no header, until a header takes its place.
    return [f"{name}/" if os.path.isdir(path) else name for name, path in found.items()]


def names_in(folder: str) -> set[str]:
    """Return the names of all that is in a folder; none if it is not there."""
    try:
        return set(os.listdir(folder))
    except OSError:
        return set()


def libc() -> str:
    """Return the name and version of the C library; empty where it is not glibc."""
    names = getattr(os, "confstr_names", {})
    return (os.confstr("CS_GNU_LIBC_VERSION") or "") if "CS_GNU_LIBC_VERSION" in names else ""
