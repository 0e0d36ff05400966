"""Check the gradients of a function: on every back end, in every mode of autograd."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch

from ops._core import checks, dispatch, selection
from ops._errors import (
    ArgumentError,
    ArgumentTypeError,
    ConfigError,
    GradientCheckWarning,
    JitopsError,
    did_you_mean,
)
from ops.gradcheck import _table, _traits
from ops.gradcheck._comparison import Tolerance
from ops.gradcheck._mismatch import AGREEMENT
from ops.gradcheck._probe import Probe, Settings, leaves_of
from ops.gradcheck._report import CANNOT_TELL, FAIL, NOT_RUN, Check, GradientReport
from ops.gradcheck._subject import Subject

__all__ = ["GradientReport", "check_gradients"]

_CHOOSE = (
    "no input requires gradients, so all floating ones are checked; mark some with "
    "requires_grad_() to check only those"
)
_OTHERS = (
    "the results depend on tensors that are no inputs, of shapes {}, whose gradients are not "
    "checked; pass them as inputs, or pass their module as the function"
)
OneBackend = Literal["torch", "cpp", "cuda"]
_BACKENDS: tuple[OneBackend, ...] = get_args(OneBackend)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_gradients(
    function: Callable[..., Any],
    *inputs: Any,
    backends: Sequence[OneBackend] | None = None,
    dtypes: Sequence[torch.dtype] = _DTYPES,
    step: float = 1e-5,
    rtol: float = 1e-5,
    atol: float = 0.0,
    max_elements: int = 200,
    seed: int = 0,
    name: str | None = None,
    order: int = 2,
) -> GradientReport:
    """Check the gradients of a function or module.

    For each back end:

    - *reverse mode*: the gradient equals central differences (f(x + h) − f(x − h)) / 2h in float64.
      Every element of every input is compared, for all results together and for each alone. Fixed
      random numbers weight the results.
    - *second order*: the same holds for the gradient of the gradient, and up to ``order``.
    - *exact zeros*: reverse mode holds where some elements are zero.
    - *forward mode*: it agrees with reverse mode, for each input, for all at once, and for second
      derivatives.
    - *batched gradients* (``is_grads_batched``), *vmap*: they agree with single calls.
    - *linearity*: gradients are linear in the gradients that arrive, and zero for zeros.
    - *layouts*: transposed, strided, offset and expanded inputs and arriving gradients change
      nothing.
    - *requires_grad subsets*: each gradient is the same when only some are requested.
    - *non-leaf inputs*: gradients are the same for inputs that other functions computed.
    - *one tensor twice*: a tensor given in two places gets the sum of both gradients.
    - *without gradients*: results are the same under ``no_grad`` and ``inference_mode``.
    - *interleaved calls*: calls before the backward pass, and a second backward pass, change
      nothing. In-place changes of inputs and results change nothing, or raise an error.
    - *default dtype*: ``torch.set_default_dtype`` changes nothing.
    - *determinism*: five runs give the same bits.
    - *inputs untouched*: the function writes to none of its inputs, of their ``.grad``, and of the
      arriving gradients.
    - *agrees in* each of ``dtypes``: results and gradients agree with the pure-torch path in
      float64, from the same rounded inputs. They may differ by 1e-9 of the largest element in
      float64, 2e-5 in float32, 2⁻⁶ in bfloat16 and 2⁻⁹ in float16, plus the effect of rounding the
      inputs once more. Small gradients may be off by half, or by the effect of rounding every
      intermediate value. Inputs of several dtypes are compared as given, too.

    A gradient fails if it is missing, or zero although the result depends on the input. A mode that
    the function refuses by an error is reported as *not supported*. If the step does not fit the
    point, larger and smaller ones are tried. At a kink, such as a clamp or an argmin, the gradient
    must lie between the slopes of both sides, and the report names the place. Where several kinks
    meet, it must lie between the slopes nearby. If rounding hides a derivative at every step, the
    report says *cannot tell*, and a warning is issued.

    A function that computes in less precision than its inputs, or accepts only their dtype, is
    checked to that precision. If a function draws random numbers, each call starts with one seed,
    except for *determinism*. A note in the report says so in either case.

    Args:
        function: a function, or a module, whose parameters are checked too.
        inputs: its arguments: tensors, lists, tuples and dictionaries of tensors, and anything
            else. Inputs that require gradients are checked, or all floating ones if none does. So
            mark some if others, such as targets and masks, have no gradient. Inputs are not
            changed. Use small ones, because the time grows with the number of elements.
        backends: back ends of the called ops, among ``torch``, ``cpp``, ``cuda``. A named one that
            cannot run fails. By default ``torch`` and all others that can run here. A function that
            calls no op with back ends is checked once, as ``torch``.
        dtypes: the dtypes to compare with float64.
        step: first h, for elements of magnitude up to 1; relative to larger elements.
        rtol, atol: allowed difference of gradient and quotient beyond rounding errors.
        max_elements: the largest number of elements of an input to compare one by one. A larger
            input is compared at evenly spread elements, and all of it in 32 blocks; the report says
            so.
        seed: seed of the random weights and directions.
        name: name of the function in the report.
        order: order of the highest derivatives: 1 for gradients only, 3 for third ones too.

    Returns:
        A :class:`GradientReport`. It prints as a table, and is true if all is right.

    Warns:
        GradientCheckWarning: rounding hides some derivative, so the check cannot tell.

    Raises:
        ArgumentTypeError: ``function`` cannot be called, or returns no floating tensor.
        ArgumentError: no input has a gradient, or a number or dtype is unusable.
        ConfigError: a back end is unknown.

    Example:
        In a test: ``ops.check_gradients(my_loss, torch.randn(3, 4)).raise_if_failed()``.
    """
    subject = Subject(function, inputs, name)
    tolerance = Tolerance(_number("rtol", rtol), _number("atol", atol), _number("step", step))
    if tolerance.step == 0:
        raise ArgumentError(f"step must be positive, got {step}")
    max_elements = checks.check_count("max_elements", max_elements)
    seed, order = checks.check_int("seed", seed), checks.check_count("order", order)
    if order > 1 + len(_table.ORDERS):
        raise ArgumentError(f"order must be at most {1 + len(_table.ORDERS)}, got {order}")
    _among("dtypes", dtypes, tuple(AGREEMENT), ArgumentError)
    if backends is not None:
        _among("backends", backends, _BACKENDS, ConfigError)
        if not backends:
            raise ArgumentError("backends must name at least one, or be None, got none")
    settings = Settings(tolerance, tuple(dtypes), max_elements, seed)
    cuda = {t.device for t in subject.tensors if t.is_cuda}
    # The caller may be in a mode without gradients, and wants the state of its random numbers kept.
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
    subject: Subject, settings: Settings, backends: Sequence[OneBackend] | None, order: int
) -> GradientReport:
    home = subject.tensors[0].device

    def probe(backend: OneBackend) -> Probe:
        device = torch.device(selection.DEVICE_OF.get(backend, home))
        plain = Probe(subject, backend, device, settings)
        traits = _traits.find(
            lambda dtype: subject.at(dtype, device), plain.results_and_gradients, plain.call
        )
        return dataclasses.replace(plain, traits=traits)

    reference = probe("torch")
    given = reference.at() if reference.mixed else reference.as_given()
    leaves = reference.leaves(given)
    given = leaves if reference.traits.differentiates else given
    used = dispatch.used_by(lambda: reference.call(given))
    checks: list[Check] = []
    notes = dict.fromkeys(reference.traits.notes)
    with contextlib.suppress(Exception):  # the checks report it
        others = leaves_of(reference.call(leaves), besides=leaves)
        if others:
            shapes = ", ".join(str(list(tensor.shape)) for tensor in others)
            notes[_OTHERS.format(shapes)] = None
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
            meant = did_you_mean(str(value), words.split(", "))
            raise error(f"{name} must be among {words}, got {value!r}{meant}")


def _number(name: str, value: float) -> float:
    value = checks.check_number(name, value)
    if not 0 <= value < float("inf"):
        raise ArgumentError(f"{name} must be finite and at least 0, got {value}")
    return value


def _cannot_run(used: Sequence[dispatch.Op], backend: OneBackend) -> str | None:
    """The reason why a back end cannot run, if there is one."""
    if backend == "torch":
        return None
    if not used:
        return "the function calls no op that has back ends"
    try:
        with selection.use_backend(backend):
            return next(filter(None, (op.problem_with(backend) for op in used)), None)
    except ConfigError as error:
        return str(error)
