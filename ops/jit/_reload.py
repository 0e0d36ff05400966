"""A newer version of a library in the place of an older one whose operators torch knows.

torch ends the process if operators are registered twice. So every library of operators that is
built here can withdraw its registrations (``jitops_retire``), while its code stays in memory for
whoever still runs it. And because a static initialiser can end the process too (a schema that does
not parse, say), the newer version is first loaded in a new Python.
"""

from __future__ import annotations

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
_MOST = 2000  # characters of the output of a trial that are passed on
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
    """Withdraw the operators of older versions of a library that are in its way."""
    present = [one for one in loaded if one.registers and not one.retired]
    older = [one for one in present if one.name == spec.name and _conflicts(one, content)]
    others = [one for one in present if one not in older]
    if not all(hasattr(one.library, "jitops_retire") for one in older):
        raise BuildError(
            f"{spec.name} has changed, and its older version cannot be withdrawn: start a new "
            f"process"
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
    for name in _namespaces(theirs) & _namespaces(content):
        whole = b"TORCH_LIBRARY_init_" + name.encode()
        if whole in theirs and whole in content:
            return f"the namespace {name!r} of the extension {other.name!r}"
        for qualified in torch._C._dispatch_get_all_op_names():
            schema = b"\0%b(" % qualified.partition("::")[2].partition(".")[0].encode()
            if qualified.startswith(f"{name}::") and schema in theirs and schema in content:
                return f"the operator {qualified} of the extension {other.name!r}"
    return None


# ---- the trial -----------------------------------------------------------------------------------


def _try(
    spec: Spec, path: str, older: list[Loaded], others: list[Loaded], clash: str | None
) -> None:
    """Load a library in a new Python, beside all that this one has loaded."""
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
        nothing, command = subprocess.DEVNULL, [python, "-c", text]
        try:
            done = subprocess.run(
                command, stdin=nothing, stdout=nothing, stderr=said, timeout=_LONGEST, check=False
            )
            how = f"would end the process: {_described(done.returncode)} in"
        except subprocess.TimeoutExpired:
            how = f"would not end within {_LONGEST:g} s of"
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
    names = {one.value: one.name for one in signal.Signals}
    return f"signal {-status} ({names.get(-status, 'unnamed')})"


def _fatal(spec: Spec, step: str, how: str, words: str, clash: str | None) -> str:
    start = max(words.rfind("terminate called"), words.rfind("terminating "))
    told = " ".join((words[start:][:_MOST] if start >= 0 else words[-_MOST:]).split())
    fix = "mend that; the older version, if there is one, is still in force"
    if clash:
        cause = f"it registers {clash}, which this process has loaded"
        fix = "give it other names, or load only one of the two in a process"
    elif step.startswith("the older"):
        cause = "code of the version that it replaces, which runs when that is withdrawn, fails"
        fix = "start a new process: in this one, the older version stays in force"
    elif start >= 0:
        cause = "an exception leaves one of its static initialisers, such as of a schema that " \
                "torch refuses"  # fmt: skip
    else:
        cause = "code that runs when it is loaded, such as a static initialiser, does not come back"
    return (
        f"{spec.name} was built but does not load:\n  loading it {how} {step}: "
        f"{told or 'nothing said'}\n  cause: {cause}\n  fix:   {fix}"
    )


# ---- withdrawal ----------------------------------------------------------------------------------


def _withdraw(loaded: Loaded) -> list[str]:
    """Take back a library's registrations with torch; return the names of its operators."""
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


# Operators that somebody may still hold must not go. An implementation on a key that nobody uses
# keeps them, and the newer version fills them again.
_keepers: dict[str, torch.library.Library] = {}
_kept: set[tuple[str, str]] = set()
_UNUSED_KEY = "PrivateUse3"


def _keep(namespace: str, operator: str) -> None:
    if (namespace, operator) in _kept:
        return
    if namespace not in _keepers:
        _keepers[namespace] = torch.library.Library(namespace, "FRAGMENT")
    _keepers[namespace].impl(operator, _withdrawn, _UNUSED_KEY)
    _kept.add((namespace, operator))


def _withdrawn(*_: object) -> None:
    raise BuildError("this operator has been withdrawn")
