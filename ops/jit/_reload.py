"""A library whose operators torch knows already, from an older version of it or from others.

torch ends the process if operators are registered twice. So every library of operators that is
built here can withdraw its registrations (``jitops_retire``), while its code stays in memory for
whoever still runs it. And because a static initialiser can end the process too (a schema that does
not parse, say), a newer version is first loaded in a new Python, as is a library that seems to
register operators of others.
"""

import contextlib
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ops._errors import BuildError
from ops.jit._cache import _location, _publish
from ops.jit._compile import _compilers
from ops.jit._spec import Spec

if TYPE_CHECKING:
    from ops.jit._load import Loaded

_LONGEST = 60.0  # seconds that a trial may take
_MOST = 2000  # characters of the output of a trial that are passed on
_STEP = "\njitops: "  # before each step that the new Python says it takes
# Operators that somebody may still hold must not go. An implementation on a key that nobody uses
# keeps them, and the newer version fills them again.
_keepers: dict[str, torch.library.Library] = {}
_UNUSED_KEY = "PrivateUse3"

_TRIAL = """
import ctypes, faulthandler, importlib.machinery, importlib.util, os, resource, sys
sys.path[:] = {path!r}
import torch
def at(step):
    os.write(2, ({step!r} + step + chr(10)).encode())
faulthandler.disable()
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
for path in filter(os.path.exists, {beside!r}):
    ctypes.CDLL(path)
others = []
for namespace, schema in {others!r}:
    try:
        others.append(torch.library.Library(namespace, "FRAGMENT" if schema else "DEF"))
        schema and others[-1].define(schema)
    except (RuntimeError, ValueError):
        pass  # torch's own, or of a library that is beside it
at("begun")
try:
    if {module!r}:
        loader = importlib.machinery.ExtensionFileLoader({name!r}, {library!r})
        spec = importlib.util.spec_from_file_location({name!r}, {library!r}, loader=loader)
        loader.exec_module(importlib.util.module_from_spec(spec))
    else:
        ctypes.CDLL({library!r})
    at("loaded")
except BaseException as error:
    at("raised")
    os.write(2, str(error).encode(errors="replace"))
finally:
    os._exit(0)
"""


def prepare(
    spec: Spec, path: str, content: bytes, loaded: "Sequence[Loaded]", taken: Mapping[str, bool]
) -> list[str]:
    """Withdraw the operators of older versions of a library; return their names.

    ``taken`` are its namespaces in which others, or older versions, have defined something.
    """
    versions = [one for one in loaded if one.name == spec.name]
    older = [one for one in versions if one.content]
    beside = [one.library._name for one in loaded if one.content and one not in older]
    # Without jitops_retire nothing can be withdrawn, and torch takes no custom class back.
    if any(
        not hasattr(one.library, "jitops_retire") or b"registerCustomClass" in one.content
        for one in older
    ):
        raise BuildError(
            f"{spec.name} has changed, and its older version cannot be withdrawn: start a new "
            f"process"
        )
    others = _of_others(content, b"".join(one.content for one in older), taken)
    if versions or others:
        _try(spec, path, beside, others)
    return [name for one in older for name in _withdraw(one)]


@contextlib.contextmanager
def copied(library: Path, content: bytes) -> Iterator[str]:
    """Yield the path of a copy: the dynamic linker would not initialise one file twice."""
    with _publish.staging(_location.writable_root(), library.stem) as folder:
        (folder / library.name).write_bytes(content)
        yield str(folder / library.name)


def _words(content: bytes) -> set[bytes]:
    """Return the texts in a library: names of namespaces and of operators, among others."""
    return set(content.replace(b"(", b"\0").split(b"\0"))


def _of_others(content: bytes, older: bytes, taken: Mapping[str, bool]) -> list[tuple[str, str]]:
    """List the operators of others that a library seems to register again: namespace and schema.

    An empty schema stands for the definition of the namespace itself.
    """
    mark = b"TORCH_LIBRARY_static_init_%b\0"
    found = [(ns, "") for ns, whole in taken.items() if whole and mark % ns.encode() not in older]
    words = _words(content) - _words(older)
    for name in torch._C._dispatch_get_all_op_names():
        namespace, _, operator = name.partition("::")
        if namespace in taken and operator.encode() in words:
            with contextlib.suppress(RuntimeError):  # it has no schema, so it is free
                schema = torch._C._get_schema(*name.partition(".")[::2])
                found.append((namespace, str(schema).partition("::")[2]))
    return found


def _try(spec: Spec, path: str, beside: list[str], others: Sequence[tuple[str, str]]) -> None:
    """Load a library in a new Python, beside others and the registrations that it may repeat."""
    python = _compilers.python()
    if python is None:
        return  # an application that has Python built in: there is nothing to try it with
    text = _TRIAL.format(
        path=sys.path,
        step=_STEP,
        others=others,
        beside=beside,
        module=spec.is_python_module,
        name=spec.name,
        library=path,
    )
    with tempfile.TemporaryFile() as said:
        nothing, command = subprocess.DEVNULL, [python, "-c", text]
        try:
            code = subprocess.call(
                command, stdin=nothing, stdout=nothing, stderr=said, timeout=_LONGEST
            )
            died = f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit {code}"
            how = f"would end the process: {died} in"
        except subprocess.TimeoutExpired:
            how = f"would not end within {_LONGEST:g} s of"
        except OSError:
            return  # no memory, or no more processes, for a second one
        said.seek(0)
        _, begun, last = said.read().decode(errors="replace").rpartition(_STEP)
    step, _, words = last.partition("\n")
    if step == "loaded" or not begun:
        return  # or it did not get as far as to load it, which tells nothing
    if step == "raised":
        raise ImportError(words[-_MOST:])
    start = max(words.rfind("terminate called"), words.rfind("terminating "))
    told = " ".join((words[start:][:_MOST] if start >= 0 else words[-_MOST:]).split())
    cause = "code that runs when it is loaded, such as a static initialiser, fails"
    fix = "mend that; the older version, if there is one, is still in force"
    if others:
        theirs = (f"{one}::{schema}" if schema else f"namespace {one}" for one, schema in others)
        cause = f"it registers a second time, of these: {', '.join(theirs)}"
        fix = "give it another name; of two extensions, load only one in a process"
    raise BuildError(
        f"{spec.name} was built but does not load:\n  loading it {how} its initialisers: "
        f"{told or 'nothing said'}\n  cause: {cause}\n  fix:   {fix}"
    )


def _withdraw(loaded: "Loaded") -> list[str]:
    """Take back a library's registrations with torch; return the names of its operators."""
    words = _words(loaded.content) - {b"aten"}
    every = torch._C._dispatch_get_all_op_names()
    names = [name for name in every if name.partition("::")[0].encode() in words]
    for namespace, _, operator in (name.partition("::") for name in names if name not in _keepers):
        keeper = _keepers[f"{namespace}::{operator}"] = torch.library.Library(namespace, "FRAGMENT")
        keeper.impl(operator, _withdrawn, _UNUSED_KEY)
    loaded.library.jitops_retire()
    loaded.retired, loaded.content = True, b""
    return names


def renew(names: Iterable[str]) -> None:
    """Give the objects in ``torch.ops`` the schemas of the newer version.

    They must be the same objects as before. torch keeps a pointer to each that has ever passed
    through a dispatch mode, does not own it, and follows it at the next call.
    """
    for namespace, name in {tuple(name.partition(".")[0].split("::")) for name in names}:
        operators = getattr(torch.ops, namespace)
        packet = vars(operators).pop(name, None)
        if packet is None:
            continue  # nobody has looked it up
        newer = getattr(operators, name, None)
        vars(operators)[name] = packet
        if newer is None:
            continue  # the newer version has no such operator
        kind = torch._ops.OpOverload
        overloads = {key: one for key, one in vars(packet).items() if isinstance(one, kind)}
        for key, overload in overloads.items():
            if hasattr(newer, key):
                # The registrations in Python on the overload stay.
                its = {"_overloadpacket": packet, "py_kernels": overload.py_kernels}
                vars(overload).update({**vars(getattr(newer, key)), **its})
        vars(packet).update({**vars(newer), **overloads})


def _withdrawn(*_: object) -> None:
    raise BuildError("this operator has been withdrawn")
