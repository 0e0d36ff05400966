"""The verdict of torch's own check on a wrong gradient."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from ops.gradcheck._probe import Outcome, Probe


def second_opinion(probe: Probe, outcome: Outcome, which: int) -> Outcome:
    """Add the verdict of torch's own check to an outcome with a problem."""
    tensors = probe.variables(probe.at())
    if not outcome.problem or which > 2 or sum(t.numel() for t in tensors) > probe.settings.at_most:
        return outcome

    def function(*variables: Tensor) -> tuple[Tensor, ...]:
        variable = iter(variables)
        return probe.call(
            [next(variable) if v else t for t, v in zip(probe.at(), probe.variable, strict=True)]
        )

    check = torch.autograd.gradcheck if which == 1 else torch.autograd.gradgradcheck
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            right = check(function, [t.requires_grad_() for t in tensors], raise_exception=False)
        says = "finds nothing wrong with it" if right else "finds it wrong, too"
    except Exception as error:
        says = f"raises {type(error).__name__}"
    return Outcome(
        f"{outcome.problem}\ntorch.autograd.{check.__name__} {says}",
        outcome.comparison,
        outcome.note,
    )
