"""Whether a function's gradients are right: on every back end, in every mode autograd has."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ops._core import checks, dispatch, selection
from ops._errors import (
    ArgumentError,
    ArgumentTypeError,
    ConfigError,
    GradientCheckWarning,
    JitopsError,
)
from ops.gradcheck import _table, _traits
from ops.gradcheck._comparison import Tolerance
from ops.gradcheck._differ import AGREEMENT
from ops.gradcheck._probe import Probe, Settings
from ops.gradcheck._report import CANNOT_TELL, FAIL, NOT_RUN, Check, GradientReport
from ops.gradcheck._subject import Subject

__all__ = ["GradientReport", "check_gradients"]

_CHOOSE = (
    "no input requires gradients, so all floating ones are checked: mark some with "
    "requires_grad_() to check only these"
)
_BACKENDS = ("torch", *selection.DEVICE_OF)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_gradients(
    function: Callable[..., Any],
    *inputs: Any,
    backends: Sequence[str] | None = None,
    dtypes: Sequence[torch.dtype] = _DTYPES,
    step: float = 1e-5,
    rtol: float = 1e-5,
    atol: float = 0.0,
    max_elements: int = 200,
    seed: int = 0,
    name: str | None = None,
    order: int = 2,
) -> GradientReport:
    r"""Check the gradients of a function or module against what they must be.

    For each back end:

    - *reverse mode*: against central differences :math:`(f(x+h) - f(x-h)) / 2h` in float64, for
      every element of every input, of all results together and of each alone (the results are
      weighted with fixed random numbers);
    - *second order*, and with ``order`` further ones: the same of the gradients themselves;
    - *exact zeros*: the same where some elements of an input are zero;
    - *forward mode*, *batched gradients* (``is_grads_batched``) and *vmap*: against reverse mode;
    - *linearity*: gradients are scaled and added up as those that arrive are, and zero for zeros;
    - *layouts*: inputs, and gradients that arrive, transposed, strided, offset and expanded;
    - *requires_grad subsets*: the same gradients where only some are asked for;
    - *non-leaf inputs*, *one tensor twice*: the same for inputs that are results, or one tensor;
    - *without gradients*: the same results under ``no_grad`` and ``inference_mode``;
    - *interleaved calls*: the same with other calls before the backward pass, and after a first;
    - *default dtype*: the same whatever ``torch.set_default_dtype`` has set;
    - *determinism*: five runs, bit for bit; *inputs untouched*: nothing is written to;
    - each of ``dtypes``: results and gradients against the pure-torch path in float64, from the
      same rounded inputs: within :math:`10^{-9}` of the largest element for float64,
      :math:`2 \cdot 10^{-5}` for float32, :math:`2^{-6}` for bfloat16, :math:`2^{-9}` for float16,
      plus what rounding the inputs once more would change. Small gradients must be right by half,
      as far as rounding every number on the way does not explain more.

    A gradient that is missing or zero where the result depends on the input fails. What a function
    refuses by an error is reported as not supported. Where the step does not fit the point, larger
    and smaller ones are tried. At a kink (a clamp, an argmin) the gradient must lie between the
    slopes on both sides, and the report says where that is. Where rounding errors hide a
    derivative at every step, because the results are too large beside what it changes, the report
    says *cannot tell*, and there is a warning.

    A function that computes in less precision than its inputs', or runs in their dtype only, is
    checked as precisely as that allows. One that draws random numbers begins each call with one
    seed; only *determinism* asks that it does so itself. The report has a note of either.

    Args:
        function: a function, or a module, whose parameters are checked too.
        inputs: its arguments: tensors, and anything else. Tensors may lie within lists, tuples and
            dictionaries. Those that require gradients are checked, or all floating ones if none
            does: mark those that matter where others, as targets and masks, have no gradient. They
            are not changed. Small ones will do: the time goes with their elements.
        backends: of the ops that the function calls, among ``torch``, ``cpp``, ``cuda``; one that
            cannot run fails. By default ``torch``, and those of the others that can run here. A
            function that calls no op with back ends runs as ``torch``.
        dtypes: in which to compare with float64.
        step: :math:`h` to begin with, for elements of magnitude up to 1, and relative to larger
            ones.
        rtol, atol: how far apart gradient and difference may be, beyond what rounding explains.
        max_elements: of one input, to compare with differences one by one: evenly spread over
            larger ones, and the report says so. All of these are compared in 32 blocks, too.
        seed: of the random weights and directions.
        name: of the function, for the report.
        order: up to which to check derivatives: 1 for gradients only, 3 for third ones, too.

    Returns:
        The report: prints as a table, is true where nothing is wrong; see :class:`GradientReport`.

    Warns:
        GradientCheckWarning: it cannot tell whether some gradient is right.

    Raises:
        ArgumentTypeError: ``function`` cannot be called, or returns no floating tensor.
        ArgumentError: no input has a gradient; an unusable number or dtype.
        ConfigError: no such back end.

    Example:
        In a test: ``ops.check_gradients(my_loss, torch.randn(3, 4)).raise_if_failed()``.
    """
    subject = Subject(function, inputs, name)
    tolerance = Tolerance(_number("rtol", rtol), _number("atol", atol), _number("step", step))
    if tolerance.step == 0:
        raise ArgumentError(f"step must be positive, got {step}")
    checks.check_count("max_elements", max_elements)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ArgumentTypeError(f"seed must be an int, got {type(seed).__name__}")
    checks.check_count("order", order)
    if order > 1 + len(_table.ORDERS):
        raise ArgumentError(f"order must be at most {1 + len(_table.ORDERS)}, got {order}")
    _among("dtypes", dtypes, tuple(AGREEMENT), ArgumentError)
    if backends is not None:
        _among("backends", backends, _BACKENDS, ConfigError)
        if not backends:
            raise ArgumentError("backends must name at least one, or be None, got none")
    settings = Settings(tolerance, tuple(dtypes), max_elements, seed)
    cuda = {t.device for t in subject.tensors if t.is_cuda}
    # Whatever mode the caller is in, because nothing has a gradient there; and the caller's random
    # numbers are not disturbed.
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng([*cuda]):
        report = _report(subject, settings, backends, order)
    for check in report.doubts:
        first = check.detail.splitlines()[0]
        warnings.warn(
            f"{report.function}: {check.name}: {CANNOT_TELL}: {first}",
            GradientCheckWarning,
            stacklevel=2,
        )
    return report


def _report(
    subject: Subject, settings: Settings, backends: Sequence[str] | None, order: int
) -> GradientReport:
    home = subject.tensors[0].device

    def probe(backend: str) -> Probe:
        device = torch.device(selection.DEVICE_OF.get(backend, home))
        plain = Probe(subject, backend, device, settings)
        traits = _traits.find(
            lambda dtype: subject.at(dtype, device), plain.results_and_gradients, plain.call
        )
        return dataclasses.replace(plain, traits=traits)

    reference = probe("torch")
    given = reference.as_given()
    given = reference.leaves(given) if reference.traits.differentiates else given
    used = dispatch.used_by(lambda: reference.call(given))
    checks: list[Check] = []
    notes = dict.fromkeys(reference.traits.notes)
    for backend in _BACKENDS if backends is None else backends:
        problem = _cannot_run(used, backend)
        if not problem:
            its = reference if backend == "torch" else probe(backend)
            notes |= dict.fromkeys(its.traits.notes)
            checks += _table.run(its, reference, order)
        elif backends is not None:
            checks.append(Check(backend, "", FAIL, problem))
        elif used:
            checks.append(Check(backend, "", NOT_RUN, problem))
    if subject.chosen and any(check.status == FAIL and check.name for check in checks):
        notes[_CHOOSE] = None
    return GradientReport(subject.name, str(subject), checks, tuple(notes))


def _among(name: str, values: Any, allowed: Sequence[Any], error: type[JitopsError]) -> None:
    words = ", ".join(str(value).removeprefix("torch.") for value in allowed)
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise ArgumentTypeError(
            f"{name} must be a list or tuple of {words}, got {type(values).__name__}"
        )
    for value in values:
        if value not in allowed:
            raise error(f"{name} must be among {words}, got {value!r}")


def _number(name: str, value: float) -> float:
    value = checks.check_number(name, value)
    if not 0 <= value < float("inf"):
        raise ArgumentError(f"{name} must be finite and at least 0, got {value}")
    return value


def _cannot_run(used: Sequence[dispatch.Op], backend: str) -> str | None:
    """Why a back end is out of the question."""
    if backend == "torch":
        return None
    if not used:
        return "the function calls no op that has back ends"
    try:
        with selection.use_backend(backend):
            return next(filter(None, (op.problem_with(backend) for op in used)), None)
    except ConfigError as error:
        return str(error)
