"""``ops.explain()``: per op, which path runs on which tensors, and why."""

from __future__ import annotations

from dataclasses import dataclass

from ops import _config
from ops._core import dispatch, selection
from ops._errors import ArgumentError, JitopsError, did_you_mean


@dataclass(frozen=True)
class Explanation:
    """What runs an op on tensors of one device, and the state of each compiled back end.

    Attributes:
        op: the op.
        runs: device type to back end; ``error`` where a call would raise.
        reasons: device type to the reason.
        compiled: ``cpp`` and ``cuda`` to what is known of them: cached where, would be built, or
            why not.
    """

    op: str
    runs: dict[str, str]
    reasons: dict[str, str]
    compiled: dict[str, str]

    def __str__(self) -> str:
        lines = [self.op]
        for device, backend in self.runs.items():
            lines.append(f"  {device:4} tensors -> {backend:5}  {self.reasons[device]}")
        for backend, state in self.compiled.items():
            lines.append(f"  {backend:4} {state}")
        return "\n".join(lines)


class Explanations(tuple[Explanation, ...]):
    """Several explanations; prints as a readable text."""

    def __str__(self) -> str:
        return "\n".join(map(str, self))

    __repr__ = __str__


def explain(*names: str) -> Explanations:
    """Say per op which path runs on CPU and on CUDA tensors, and why.

    Builds nothing, loads nothing, and does not initialise CUDA.

    Args:
        names: ops to explain; all that have compiled back ends by default.

    Raises:
        ArgumentError: no such op.
        ConfigError: a ``JITOPS_`` variable has an impossible value.
    """
    _config.settings()
    known = dispatch.known()
    for name in names:
        if name not in known:
            raise ArgumentError(
                "names must be among the ops that have compiled back ends of their own, "
                f"{', '.join(known)}, got {name!r}{did_you_mean(name, known)}"
            )
    return Explanations(_explain(known[name]) for name in names or known)


def _explain(op: dispatch.Op) -> Explanation:
    runs, reasons = {}, {}
    asked = selection.requested()
    for device in ("cpu", "cuda"):
        try:
            choice = op.choose(asked, device)
            if choice.backend in selection.DEVICE_OF:
                problem = op.problem_with(choice.backend)
                if problem:
                    choice = op.without(choice.backend, asked, problem)
        except JitopsError as error:
            runs[device], reasons[device] = "error", str(error)
        else:
            runs[device], reasons[device] = choice.backend, choice.reason
    states = {backend: _state(op, backend) for backend in selection.DEVICE_OF}
    return Explanation(op.name, runs, reasons, states)


def _state(op: dispatch.Op, backend: str) -> str:
    problem = op.problem_with(backend)
    if problem:
        return f"cannot run: {problem}"
    extension = op.extension(backend)
    library = extension.find() if extension else None
    if library:
        return f"built: {library}"
    if _config.settings().force_cpu:
        return "not built yet, and with JITOPS_FORCE_CPU=1 no call needs it"
    return "not built yet: the first call that needs it compiles it"
