"""The list of all checks of :func:`ops.check_gradients`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch

from ops._errors import JitopsError
from ops.gradcheck import _agreement, _calls, _derivatives, _layouts, _requests, _transforms
from ops.gradcheck._probe import Outcome, Probe
from ops.gradcheck._report import CANNOT_TELL, EXACT_ZEROS, FAIL, PASS, UNSUPPORTED, Check
from ops.gradcheck._traits import default_dtype, short

# The flag: whether a function may refuse by an error, which is reported and is not a failure.
_CHECKS: tuple[tuple[str, Callable[[Probe], Outcome], bool], ...] = (
    ("reverse mode", _derivatives.reverse_mode, False),
    (EXACT_ZEROS, _derivatives.exact_zeros, False),
    ("forward mode", _transforms.forward_mode, True),
    ("batched gradients", _transforms.batched_gradients, True),
    ("vmap", _transforms.vmap, True),
    ("linearity", _requests.linearity, False),
    ("layouts", _layouts.layouts, True),
    ("requires_grad subsets", _requests.subsets, False),
    ("non-leaf inputs", _calls.non_leaf_inputs, True),
    ("one tensor twice", _calls.one_tensor_twice, True),
    ("without gradients", _requests.without_gradients, True),
    ("interleaved calls", _calls.interleaved_calls, True),
    ("default dtype", _requests.default_dtypes, True),
    ("determinism", _calls.determinism, False),
    ("inputs untouched", _calls.inputs_untouched, False),
)
ORDERS = ("second", "third", "fourth", "fifth")


def run(probe: Probe, reference: Probe, order: int) -> Iterator[Check]:
    """Run all checks on one back end; ``reference`` is the pure-torch path."""
    with default_dtype(probe.traits.default):
        yield from _all_of(probe, reference, order)


def _all_of(probe: Probe, reference: Probe, order: int) -> Iterator[Check]:
    orders: list[tuple[str, Callable[[Probe], Outcome], bool]] = [
        (f"{name} order", functools.partial(_derivatives.order, which=which), True)
        for which, name in enumerate(ORDERS[: order - 1], 2)
    ]
    for name, question, optional in (_CHECKS[0], *orders, *_CHECKS[1:]):
        yield _ask(probe, name, functools.partial(question, probe), optional)
    dtypes = probe.settings.dtypes
    for dtype in dict.fromkeys(dtypes if probe.backend == "torch" else (torch.float64, *dtypes)):
        question = functools.partial(_agreement.agreement, probe, reference, dtype)
        name = f"agrees in {short(dtype)}"
        yield _ask(probe, name, question, optional=dtype is not torch.float64)
    if probe.mixed:
        question = functools.partial(_agreement.agreement, probe, reference, None)
        yield _ask(
            probe, f"agrees in {' and '.join(map(short, probe.mixed))}", question, optional=True
        )


def _ask(probe: Probe, name: str, question: Callable[[], Outcome], optional: bool) -> Check:
    try:
        outcome = question()
    except Exception as error:  # the report shows any error of the function under test
        refused = isinstance(error, (RuntimeError, TypeError, ValueError, JitopsError))
        status = UNSUPPORTED if optional and refused else FAIL
        first = (str(error).strip() or "no message").splitlines()[0]
        return Check(probe.backend, name, status, f"{type(error).__name__}: {first}")
    found = outcome.comparison
    doubt = found.doubt if found else ""
    status = FAIL if outcome.problem else CANNOT_TELL if doubt else PASS
    detail = outcome.problem or doubt or outcome.note
    return Check(probe.backend, name, status, detail, found)
