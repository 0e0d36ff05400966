"""A newer version of a library in the place of an older one whose operators torch knows.

torch ends the process if operators are registered twice. So every library of operators that is
built here can withdraw what it has registered (``jitops_retire``), while its code stays in memory
for whoever still runs it. And because a static initialiser can end the process too (a schema that
does not parse, say), the newer version is first loaded in a new Python.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from ops._errors import BuildError
from ops.jit._compile import _compilers
from ops.jit._spec import Spec

if TYPE_CHECKING:
    from ops.jit._load import Loaded

_LONGEST = 60.0  # seconds that a trial may take
_MOST = 2000  # characters of what it prints that are passed on
_STEP = "\njitops: "  # before each step that the new Python says it takes

_TRIAL = """
import ctypes, faulthandler, importlib.machinery, importlib.util, os, resource, sys
sys.path[:] = {path!r}
import torch
def at(step):
    os.write(2, ({step!r} + step + chr(10)).encode())
faulthandler.disable()
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
try:
    for path in {others!r}:
        ctypes.CDLL(path)
    older = [ctypes.CDLL(path) for path in {older!r}]
    for library in older:
        at("the older version's destructors")
        library.jitops_retire()
    at("its initialisers")
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
    spec: Spec, path: str, content: bytes, registers: bool, loaded: Sequence[Loaded]
) -> list[str]:
    """Withdraw the operators of older versions of a library that are in its way.

    Args:
        spec: of the extension.
        path: of the library that is about to be loaded.
        content: of that library.
        registers: whether that library registers operators.
        loaded: all libraries of this process.

    Returns:
        The qualified names of the operators that were withdrawn: :func:`renew` needs them once the
        library is loaded.

    Raises:
        BuildError: what is loaded would end the process, or cannot be withdrawn.
        ImportError: the library does not load.
    """
    present = [one for one in loaded if one.registers and not one.retired]
    older = [one for one in present if one.name == spec.name and _conflicts(one, content)]
    others = [one for one in present if one not in older]
    for one in older:
        if not hasattr(one.library, "jitops_retire"):
            raise BuildError(
                f"{spec.name} has changed, and what is loaded of it cannot be withdrawn: start a "
                f"new process"
            )
    clash = next(filter(None, (_clash(one, content) for one in others)), None)
    replaced = any(one.name == spec.name for one in loaded) and registers
    if older or clash or replaced:
        _try(spec, path, older, others, clash)
    return [name for one in older for name in _withdraw(one)]


def _conflicts(older: Loaded, content: bytes) -> bool:
    """Whether an older version has registered operators in a namespace of the newer one.

    One that has registered none may still own a namespace, and nobody knows which.
    """
    its = _namespaces(older.content)
    return not its or any(name.encode() + b"\0" in content for name in its)


def _namespaces(content: bytes) -> set[str]:
    """List the namespaces of registered operators that a library names."""
    known = {name.partition("::")[0] for name in torch._C._dispatch_get_all_op_names()}
    return {name for name in known if name.encode() + b"\0" in content}


def _clash(other: Loaded, content: bytes) -> str | None:
    """Name an operator, or a namespace, that two extensions seem to define."""
    theirs = other.content
    for name in _namespaces(theirs):
        text = name.encode()
        if text + b"\0" not in content:
            continue
        whole = b"TORCH_LIBRARY_init_" + text
        if whole in theirs and whole in content:
            return f"the namespace {name!r} of the extension {other.name!r}"
        for qualified in torch._C._dispatch_get_all_op_names():
            operator = qualified.partition("::")[2].partition(".")[0].encode()
            schema = b"\0%b(" % operator
            if qualified.startswith(f"{name}::") and schema in theirs and schema in content:
                return f"the operator {qualified} of the extension {other.name!r}"
    return None


# ---- the trial -----------------------------------------------------------------------------------


def _try(
    spec: Spec, path: str, older: list[Loaded], others: list[Loaded], clash: str | None
) -> None:
    """Load a library in a new Python, beside all that this one has loaded.

    Raises:
        BuildError: it ends that process, or does not come back.
        ImportError: it does not load.
    """
    python = _compilers.python()
    if python is None:
        return  # an application that has Python built in: there is nothing to try it with
    mine = f"/proc/{os.getpid()}/fd/"
    text = _TRIAL.format(
        path=sys.path,
        step=_STEP,
        others=[f"{mine}{one.file}" for one in others],
        older=[f"{mine}{one.file}" for one in older],
        module=spec.is_python_module,
        name=spec.name,
        library=path.replace("/proc/self/fd/", mine, 1),
    )
    with tempfile.TemporaryFile() as said:
        try:
            done = subprocess.run(
                [python, "-c", text],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=said,
                timeout=_LONGEST,
                check=False,
            )
            how = _described(done.returncode)
        except subprocess.TimeoutExpired:
            how = None
        except OSError:
            return  # no memory, or no more processes, for a second one
        said.seek(0)
        output = said.read().decode(errors="replace")
    _, said_step, last = output.rpartition(_STEP)
    step, _, words = last.partition("\n")
    if step == "loaded" or not said_step:
        return  # or it did not get as far as its first step, which tells nothing
    if step == "raised":
        raise ImportError(words[-_MOST:])
    raise BuildError(_fatal(spec, step, how, words, clash))


def _described(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    with contextlib.suppress(ValueError):  # a signal without a name
        return f"signal {-status} ({signal.Signals(-status).name})"
    return f"signal {-status}"


def _fatal(spec: Spec, step: str, how: str | None, words: str, clash: str | None) -> str:
    start = max(words.rfind("terminate called"), words.rfind("terminating "))
    told = " ".join((words[start:][:_MOST] if start >= 0 else words[-_MOST:]).split())
    if how is None:
        said = f"loading it would not end: {step} had not ended after {_LONGEST:g} s"
    else:
        said = f"loading it would end the process: {how} in {step}: {told or 'nothing said'}"
    if clash:
        cause = f"it registers {clash}, which this process has loaded"
        fix = "give it other names, or load only one of the two in a process"
    elif step.startswith("the older"):
        cause = "code of the version that it replaces, which runs when that is withdrawn, fails"
        fix = "start a new process: in this one, what was loaded before stays in force"
    elif start >= 0:
        cause = "an exception leaves one of its static initialisers, such as of a schema that " \
                "torch refuses"  # fmt: skip
        fix = "mend what it says; what was loaded before is still in force"
    else:
        cause = "code that runs when it is loaded, such as a static initialiser, does not come back"
        fix = "mend that code; what was loaded before is still in force"
    return f"{spec.name} was built but does not load:\n  {said}\n  cause: {cause}\n  fix:   {fix}"


# ---- withdrawal ----------------------------------------------------------------------------------


def _withdraw(loaded: Loaded) -> list[str]:
    """Take back what a library has registered with torch; return the names of its operators."""
    namespaces = _namespaces(loaded.content) - {"aten"}
    every = torch._C._dispatch_get_all_op_names()
    names = [name for name in every if name.partition("::")[0] in namespaces]
    for name in names:
        _keep(*name.split("::"))
    loaded.retire()
    return names


def renew(names: Iterable[str]) -> None:
    """Give the objects in ``torch.ops`` the schemas of the newer version.

    They must be the same objects as before. torch keeps a pointer to each that has ever passed
    through a dispatch mode, does not own it, and follows it at the next call.
    """
    for namespace, name in {tuple(name.partition(".")[0].split("::")) for name in names}:
        known = vars(getattr(torch.ops, namespace))
        packet = known.pop(name, None)
        if packet is None:
            continue  # nobody has looked it up
        newer = getattr(getattr(torch.ops, namespace), name, None)
        known[name] = packet
        if newer is None:
            continue  # the newer version has no such operator
        overloads = {
            key: value
            for key, value in vars(packet).items()
            if isinstance(value, torch._ops.OpOverload)
        }
        for key, overload in overloads.items():
            if hasattr(newer, key):
                renewed = vars(getattr(newer, key))
                # What Python has registered on the overload stays.
                renewed |= {"_overloadpacket": packet, "py_kernels": overload.py_kernels}
                vars(overload).update(renewed)
        vars(packet).update({**vars(newer), **overloads})


# Operators that somebody may still hold must not go: an implementation on a key that nobody uses
# keeps them, and what replaces them fills them again.
_keepers: dict[str, torch.library.Library] = {}
_kept: set[tuple[str, str]] = set()
_UNUSED_KEY = "PrivateUse3"


def _keep(namespace: str, operator: str) -> None:
    if (namespace, operator) in _kept:
        return
    keeper = _keepers.get(namespace)
    if keeper is None:
        keeper = _keepers[namespace] = torch.library.Library(namespace, "FRAGMENT")
    keeper.impl(operator, _withdrawn, _UNUSED_KEY)
    _kept.add((namespace, operator))


def _withdrawn(*_: object) -> None:
    raise BuildError("this operator has been withdrawn")
