"""The linear-chain conditional random field: log-likelihood and decoding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ops._core import checks, crf
from ops._core.fused import FusedOp
from ops._errors import ArgumentError

__all__ = ["CRF", "crf_decode", "crf_log_likelihood"]

CRFReduction = Literal["none", "sum", "mean", "token_mean"]
REDUCTIONS: tuple[CRFReduction, ...] = ("none", "sum", "mean", "token_mean")

# ---- the public functions and module -------------------------------------------------------------


def crf_log_likelihood(
    emissions: Tensor,
    tags: Tensor,
    transitions: Tensor,
    start_transitions: Tensor,
    end_transitions: Tensor,
    mask: Tensor | None = None,
    reduction: CRFReduction = "sum",
    *,
    batch_first: bool = False,
) -> Tensor:
    """The log-likelihood of tags in a linear-chain conditional random field.

    .. math::

        score(y) = start_{y₁} + Σₜ eₜ(yₜ) + Σₜ T(yₜ₋₁, yₜ) + end_{y_L}
        ℓ = score(y) − log Σ_{y′} exp(score(y′))

    The sum runs over all sequences of tags y′. ℓ is never positive: the loss is its negative. From
    J. Lafferty, A. McCallum, F. Pereira, "Conditional Random Fields: Probabilistic Models for
    Segmenting and Labeling Sequence Data", ICML 2001. Names and conventions are those of
    ``torchcrf.CRF`` (pytorch-crf).

    Args:
        emissions: e, ``(T, B, K)``, floating point, any strides: the score of each of K tags.
        tags: y, ``(T, B)``, integers from 0 to K − 1. Where the mask is off, any number.
        transitions: T, ``(K, K)``: the score of a tag (column) behind another one (row).
        start_transitions: start, ``(K,)``: the score of the first tag.
        end_transitions: end, ``(K,)``: the score of the last tag.
        mask: ``(T, B)``, bool or uint8: which steps count. They come first, and the first step of
            each sequence counts. By default all count.
        reduction: ``sum``, ``mean`` over the sequences, ``token_mean`` over the steps that count,
            or ``none``.
        batch_first: whether emissions, tags and mask have the batch in front: ``(B, T, K)``.

    Returns:
        A scalar, or ``(B,)`` with ``reduction="none"``; in the dtype of ``emissions``.

    Raises:
        ArgumentTypeError: emissions and transitions that are not tensors of one dtype among
            float64, float32, bfloat16 and float16; tags that are not integers; a mask that is
            neither bool nor uint8.
        ArgumentError: shapes that do not fit together, different devices, no step or no tag, tags
            out of range, a mask whose first step is off or that has a gap, an unknown reduction. On
            a GPU tags and masks are not waited for: wrong ones make the value of their sequence
            NaN.
        BackendUnavailableError: the requested back end cannot run.

    Gradients:
        For emissions and all transitions, of any order. Steps that do not count have the gradient
        0, and no influence, even if they are NaN. If the value of a sequence is not finite, its
        gradients are NaN. Forward mode, :mod:`torch.func` and derivatives of second order run on
        the pure-torch path.

    Numerics:
        All sums run in float64, so no length or score overflows, and results in float32 are those
        of float64 rounded. Beside sums above 1e8, differences of scores lose digits. A transition
        of −10000 or −∞ forbids its pair of tags. Tags that need a transition of −∞ have the value
        −∞. Compiled kernels are bitwise deterministic for any number of threads. Under autocast
        half precisions are cast to float32.

    Memory:
        Kernels keep a float64 for each emission, and no matrices of K × K for the steps.
    """
    inputs = crf.Inputs(
        emissions, transitions, start_transitions, end_transitions, mask, batch_first=batch_first
    )
    checks.one_of("reduction", reduction, REDUCTIONS)
    tags = inputs.by_batch("tags", tags)
    checks.integers("tags", tags)
    tags = torch.ops.jitops.crf_log_likelihood_tags(
        tags.to(inputs.emissions.device, torch.int64), inputs.lengths, inputs.emissions.shape[2]
    )
    value = _fused(inputs.emissions, tags, inputs.lengths, *inputs.parameters)
    if reduction == "sum":
        value = value.sum()
    elif reduction == "mean":
        value = value.mean()
    elif reduction == "token_mean":
        batch, steps, _ = inputs.emissions.shape
        count = batch * steps if inputs.lengths is None else inputs.lengths.sum()
        value = value.sum() / count
    return value.to(inputs.emissions.dtype)


def crf_decode(
    emissions: Tensor,
    transitions: Tensor,
    start_transitions: Tensor,
    end_transitions: Tensor,
    mask: Tensor | None = None,
    *,
    batch_first: bool = False,
) -> Tensor:
    """The tags with the largest score in a conditional random field: the algorithm of Viterbi.

    Args:
        emissions, transitions, start_transitions, end_transitions, mask, batch_first: see
            :func:`crf_log_likelihood`.

    Returns:
        ``(B, T)``, int64, whatever ``batch_first`` is: the tags, and −1 behind the end.

    Scores are float64. Of two equal ones the lower tag wins, from the end. NaN counts as −∞. The
    result has no gradient. Errors are those of :func:`crf_log_likelihood`. A sequence with a wrong
    mask on a GPU has no tags.
    """
    inputs = crf.Inputs(
        emissions, transitions, start_transitions, end_transitions, mask, batch_first=batch_first
    )
    parameters = (one.detach() for one in inputs.parameters)
    path: Tensor = _decode(inputs.emissions.detach(), inputs.lengths, *parameters)
    return path


class CRF(nn.Module):
    """A linear-chain conditional random field: :func:`crf_log_likelihood` with its parameters.

    Arguments, methods and names of the parameters are those of ``torchcrf.CRF``, so a state dict of
    that module loads.

    Args:
        num_tags: K, the number of tags.
        batch_first: see :func:`crf_log_likelihood`.
    """

    def __init__(self, num_tags: int, batch_first: bool = False) -> None:
        super().__init__()
        self.num_tags = checks.check_count("num_tags", num_tags)
        self.batch_first = batch_first
        self.start_transitions = nn.Parameter(torch.empty(num_tags))
        self.end_transitions = nn.Parameter(torch.empty(num_tags))
        self.transitions = nn.Parameter(torch.empty(num_tags, num_tags))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters from a uniform distribution between -0.1 and 0.1."""
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -0.1, 0.1)

    def forward(
        self,
        emissions: Tensor,
        tags: Tensor,
        mask: Tensor | None = None,
        reduction: CRFReduction = "sum",
    ) -> Tensor:
        """The log-likelihood of the tags. The loss is its negative."""
        self._check(emissions)
        return crf_log_likelihood(
            emissions,
            tags,
            self.transitions,
            self.start_transitions,
            self.end_transitions,
            mask,
            reduction,
            batch_first=self.batch_first,
        )

    def decode(self, emissions: Tensor, mask: Tensor | None = None) -> list[list[int]]:
        """The best tags of each sequence, as lists."""
        self._check(emissions)
        parameters = (self.transitions, self.start_transitions, self.end_transitions)
        paths = crf_decode(emissions, *parameters, mask, batch_first=self.batch_first)
        return [[tag for tag in path if tag >= 0] for path in paths.tolist()]

    def _check(self, emissions: Any) -> None:
        if isinstance(emissions, Tensor) and emissions.dim() == 3:
            found = emissions.shape[2]
            if found != self.num_tags:
                raise ArgumentError(
                    f"emissions must have {self.num_tags} tags, as this module has, got {found}"
                )

    def extra_repr(self) -> str:
        """The parameters, for ``print(module)``."""
        return f"num_tags={self.num_tags}, batch_first={self.batch_first}"


# ---- the declarations ----------------------------------------------------------------------------

_fused = FusedOp(
    "crf_log_likelihood",
    crf.definition,
    results=["value"],
    saved=["sums"],
    backward=["emissions", "tags", "lengths", "transitions", "start", "end", "value", "sums"],
    constants=["tags", "lengths"],
    shapes=crf.shapes,
    tensor_code=(crf.forward, crf.backward),
    opaque_shapes=crf.shapes,
    title="CRFLogLikelihood",
)
_decode = FusedOp(
    "crf_log_likelihood_decode",
    crf.decode_definition,
    results=["path"],
    constants=["emissions", "lengths", "transitions", "start", "end", "path"],
    shapes=crf.path_shapes,
    source="crf_log_likelihood",
)


def samples() -> Iterator[checks.Sample]:
    """Where ``jitops check`` checks the gradients."""
    parameters = torch.randn(3, 3), torch.randn(3), torch.randn(3)
    tags = torch.tensor([[0, 2], [1, 1], [2, 0], [0, 0]])
    mask = torch.tensor([[1, 1], [1, 1], [1, 0], [1, 0]], dtype=torch.bool)
    for reduction in REDUCTIONS:

        def loss(
            emissions: Tensor,
            transitions: Tensor,
            start: Tensor,
            end: Tensor,
            reduction: CRFReduction = reduction,
        ) -> Tensor:
            return crf_log_likelihood(emissions, tags, transitions, start, end, mask, reduction)

        yield f"reduction={reduction!r}", loss, (torch.randn(4, 2, 3), *parameters)
