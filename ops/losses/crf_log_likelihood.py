"""The linear-chain conditional random field: log-likelihood and decoding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ops._core import autograd, checks, sequence_pairs
from ops._core.fused import FusedOp
from ops._errors import ArgumentError, ArgumentTypeError

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
    inputs = _Inputs(
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
    inputs = _Inputs(
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


# ---- checks --------------------------------------------------------------------------------------


class _Inputs:
    """Emissions by batch, the parameters, and the lengths or ``None``; checked."""

    def __init__(
        self,
        emissions: Tensor,
        transitions: Tensor,
        start_transitions: Tensor,
        end_transitions: Tensor,
        mask: Tensor | None,
        *,
        batch_first: bool,
    ) -> None:
        named = {
            "emissions": emissions,
            "transitions": transitions,
            "start_transitions": start_transitions,
            "end_transitions": end_transitions,
        }
        named = checks.widened_under_autocast(named)
        checks.same_kind(**named)
        emissions = named["emissions"]
        self.batch_first = batch_first
        self.order = "(B, T{})" if batch_first else "(T, B{})"
        if emissions.dim() != 3 or 0 in emissions.shape[1 if batch_first else 0 :: 2]:
            steps = "at least one step and one tag"
            raise ArgumentError(
                f"emissions must have shape {self.order.format(', K')}, with {steps}, "
                f"got {list(emissions.shape)}"
            )
        labels = emissions.shape[2]
        for name, shape in (
            ("transitions", [labels, labels]),
            ("start_transitions", [labels]),
            ("end_transitions", [labels]),
        ):
            if list(named[name].shape) != shape:
                raise ArgumentError(
                    f"{name} must have shape {shape}, for {labels} tags, "
                    f"got {list(named[name].shape)}"
                )
        self.emissions = emissions if batch_first else emissions.transpose(0, 1)
        self.parameters = tuple(named.values())[1:]
        self.lengths: Tensor | None = None
        if mask is not None:
            mask = self.by_batch("mask", mask)
            if mask.dtype not in (torch.bool, torch.uint8):
                dtype = str(mask.dtype).removeprefix("torch.")
                raise ArgumentTypeError(f"mask must have dtype bool or uint8, got {dtype}")
            self.lengths = torch.ops.jitops.crf_log_likelihood_lengths(mask.to(emissions.device))

    def by_batch(self, name: str, value: Tensor) -> Tensor:
        """Tags or a mask as ``(B, T)``."""
        if not isinstance(value, Tensor):
            raise ArgumentTypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
        checks.dense(name, value)
        if value.is_meta and not self.emissions.is_meta:
            device = self.emissions.device
            raise ArgumentError(f"{name} must be on device {device}, got meta")
        value = value if self.batch_first or value.dim() != 2 else value.transpose(0, 1)
        if value.shape != self.emissions.shape[:2]:
            sizes = self.emissions.shape[:2] if self.batch_first else self.emissions.shape[1::-1]
            raise ArgumentError(
                f"{name} must have shape {list(sizes)}, that is {self.order.format('')}, "
                f"got {list(value.shape if self.batch_first else value.shape[::-1])}"
            )
        return value


def _lengths_of_mask(mask: Tensor) -> Tensor:
    """The lengths. Wrong masks make them 0 where nobody waits for an error."""
    on = mask != 0
    lengths = on.sum(1)
    step = torch.arange(mask.shape[1], device=mask.device)
    wrong = ~on[:, 0], (on != (step < lengths[:, None])).any(1)
    if mask.is_cpu:
        for problem, which in zip(("its first step on", "no gap"), wrong, strict=True):
            if which.any():
                raise ArgumentError(
                    f"mask must have {problem} in each sequence, "
                    f"got {on[which][0].int().tolist()[:8]} for sequence {int(which.nonzero()[0])}"
                )
    return lengths.masked_fill(wrong[0] | wrong[1], 0)


def _checked_tags(tags: Tensor, lengths: Tensor | None, labels: int) -> Tensor:
    """The tags, with 0 as padding. Wrong ones become -1 where nobody waits for an error."""
    tags = tags.clone(memory_format=torch.contiguous_format)
    if lengths is not None:
        step = torch.arange(tags.shape[1], device=tags.device)
        tags.masked_fill_(step >= lengths[:, None], 0)
    return tags.masked_fill_(sequence_pairs.out_of_range("tags", tags, 0, labels - 1), -1)


autograd.define_in_torch(
    "crf_log_likelihood_lengths(Tensor mask) -> Tensor",
    _lengths_of_mask,
    lambda mask: mask.new_empty(mask.shape[:1], dtype=torch.int64),
)
autograd.define_in_torch(
    "crf_log_likelihood_tags(Tensor tags, Tensor? lengths, SymInt labels) -> Tensor",
    _checked_tags,
    lambda tags, lengths, labels: torch.empty_like(tags, memory_format=torch.contiguous_format),
)


# ---- the log-likelihood in tensor code -----------------------------------------------------------


def _score(
    emissions: Tensor, tags: Tensor, lengths: Tensor | None, transitions: Tensor, start: Tensor,
    end: Tensor,
) -> Tensor:  # fmt: skip
    """The scores of the tags in float64; NaN for tags that are out of range."""
    known = tags >= 0
    tags = tags.clamp(min=0)
    given = emissions.gather(2, tags[..., None])[..., 0].double()
    steps = transitions.double()[tags[:, :-1], tags[:, 1:]]
    if lengths is None:
        last = tags[:, -1]
    else:
        real = torch.arange(tags.shape[1], device=tags.device) < lengths[:, None]
        given, steps = torch.where(real, given, 0.0), torch.where(real[:, 1:], steps, 0.0)
        last = tags.gather(1, (lengths - 1).clamp(min=0)[:, None])[:, 0]
        known = known & (lengths > 0)[:, None]
    score = given.sum(1) + steps.sum(1) + start.double()[tags[:, 0]] + end.double()[last]
    return torch.where(known.all(1), score, torch.nan)


def _definition(
    emissions: Tensor, tags: Tensor, lengths: Tensor | None, transitions: Tensor, start: Tensor,
    end: Tensor,
) -> Tensor:  # fmt: skip
    score = _score(emissions, tags, lengths, transitions, start, end)
    a = start.double() + emissions[:, 0].double()
    wide = transitions.double()
    # Not by index: the gradient of each would be as large as the whole.
    for t, one in enumerate(emissions.unbind(1)[1:], 1):
        after = _log_sum(a[:, :, None] + wide) + one.double()
        a = after if lengths is None else torch.where((t < lengths)[:, None], after, a)
    value = score - _log_sum(a + end.double())
    return value + _poison(value.isfinite(), emissions, lengths, transitions, start, end)


def _log_sum(scores: Tensor) -> Tensor:
    """The logsumexp along dimension 1. If all are -inf, the gradient is 0 rather than NaN."""
    none = (scores == -torch.inf).all(1)
    return scores.masked_fill(none[:, None], 0.0).logsumexp(1).masked_fill(none, -torch.inf)


def _poison(
    finite: Tensor, emissions: Tensor, lengths: Tensor | None, *parameters: Tensor
) -> Tensor:
    """Zeros, whose gradients are NaN for the inputs of a sequence with a value that is not finite.

    The derivative of hypot at the origin is NaN. Elsewhere the argument is 1, where it is finite.
    """
    its, *rest = (one.double().nan_to_num().sigmoid().sum(-1) for one in (emissions, *parameters))
    if lengths is not None:
        real = torch.arange(its.shape[1], device=its.device) < lengths[:, None]
        its = torch.where(real, its, 0.0)
    total = its.sum(1) + sum(one.sum() for one in rest)
    origin = torch.where(finite, 1.0, total - total.detach())
    return torch.where(finite, 0.0, origin.hypot(torch.zeros_like(origin)))


def _forward(
    emissions: Tensor, tags: Tensor, lengths: Tensor | None, transitions: Tensor, start: Tensor,
    end: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, steps, _ = emissions.shape
    wide, matrix = emissions.double(), transitions.double()
    sums = torch.zeros_like(wide, memory_format=torch.contiguous_format)
    sums[:, 0] = start.double()
    every = torch.full((batch,), steps, device=tags.device) if lengths is None else lengths
    for t in range(1, steps):
        after = (matrix + (sums[:, t - 1] + wide[:, t - 1])[:, :, None]).logsumexp(1)
        sums[:, t] = torch.where((t < every)[:, None], after, 0.0)
    total = _last(wide, sums, every, end).logsumexp(1)
    return _score(emissions, tags, lengths, transitions, start, end) - total, sums


def _last(wide: Tensor, sums: Tensor, lengths: Tensor, end: Tensor) -> Tensor:
    """The scores of the labels of the last step that counts."""
    at = (lengths - 1).clamp(min=0)
    pair = torch.arange(len(wide), device=wide.device)
    return sums[pair, at] + wide[pair, at] + end.double()


def _backward(
    grad: Tensor, emissions: Tensor, tags: Tensor, lengths: Tensor | None, transitions: Tensor,
    start: Tensor, end: Tensor, value: Tensor, sums: Tensor, needs_emissions: bool,
    needs_transitions: bool, needs_start: bool, needs_end: bool,
) -> list[Tensor]:  # fmt: skip
    batch, steps, labels = emissions.shape
    wide, matrix = emissions.double(), transitions.double()
    every = torch.full((batch,), steps, device=tags.device) if lengths is None else lengths
    grad = torch.where(value.isfinite(), grad, torch.nan)[:, None]
    given = torch.nn.functional.one_hot(tags.clamp(min=0), labels).double()
    last = _last(wide, sums, every, end).softmax(1)
    flow = last
    of_emissions = torch.zeros_like(wide, memory_format=torch.contiguous_format)
    of_transitions = torch.zeros_like(matrix)
    for t in range(steps - 1, -1, -1):
        real = (t < every)[:, None]
        of_emissions[:, t] = torch.where(real, grad * (given[:, t] - flow), 0.0)
        if t == 0:
            break
        a = sums[:, t - 1] + wide[:, t - 1]
        shares = (matrix + a[:, :, None]).sub_(sums[:, t, None]).exp_()
        shares = torch.where(flow[:, None] > 0, shares * flow[:, None], 0.0)
        pairs = given[:, t - 1, :, None] * given[:, t, None]
        arrived = grad[..., None] * (pairs - shares)
        of_transitions += torch.where(real[..., None], arrived, 0.0).sum(0)
        flow = torch.where(real, shares.sum(2), flow)
    at = (every - 1).clamp(min=0)
    final = given[torch.arange(batch, device=tags.device), at]
    of_end = (grad * (final - last)).sum(0)
    of_start = of_emissions[:, 0].sum(0)
    unknown = grad.isnan().any()
    needed = (
        (of_emissions, needs_emissions),
        (torch.where(unknown, torch.nan, of_transitions), needs_transitions),
        (torch.where(unknown, torch.nan, of_start), needs_start),
        (torch.where(unknown, torch.nan, of_end), needs_end),
    )
    return [one.to(emissions.dtype) for one, need in needed if need]


def _shapes(
    emissions: Tensor, tags: Tensor, lengths: Tensor | None, transitions: Tensor, start: Tensor,
    end: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    value = emissions.new_empty(emissions.shape[:1], dtype=torch.float64)
    return value, emissions.new_empty(emissions.shape, dtype=torch.float64)


_fused = FusedOp(
    "crf_log_likelihood",
    _definition,
    results=["value"],
    saved=["sums"],
    backward=["emissions", "tags", "lengths", "transitions", "start", "end", "value", "sums"],
    constants=["tags", "lengths"],
    shapes=_shapes,
    tensor_code=(_forward, _backward),
    opaque_shapes=_shapes,
    title="CRFLogLikelihood",
)


# ---- decoding ------------------------------------------------------------------------------------


def _decode_definition(
    emissions: Tensor, lengths: Tensor | None, transitions: Tensor, start: Tensor, end: Tensor
) -> Tensor:
    path: Tensor = torch.ops.jitops.crf_log_likelihood_viterbi(
        emissions, lengths, transitions, start, end
    )
    return path


def _viterbi(
    emissions: Tensor, lengths: Tensor | None, transitions: Tensor, start: Tensor, end: Tensor
) -> Tensor:
    batch, steps, labels = emissions.shape
    wide, matrix = emissions.double(), transitions.double()
    every = torch.full((batch,), steps, device=wide.device) if lengths is None else lengths
    before = torch.zeros((steps, batch, labels), dtype=torch.int64, device=wide.device)
    scores = start.double() + wide[:, 0]
    for t in range(1, steps):
        best, before[t] = _best(scores[:, :, None] + matrix)
        scores = torch.where((t < every)[:, None], best + wide[:, t], scores)
    _, label = _best(scores + end.double())
    path = torch.full((batch, steps), -1, dtype=torch.int64, device=wide.device)
    for t in range(steps - 1, -1, -1):
        real = t < every
        path[:, t] = torch.where(real, label, -1)
        label = torch.where(real, before[t].gather(1, label[:, None])[:, 0], label)
    return path


def _best(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The largest along dimension 1, and the first place of it. NaN is below all others."""
    best = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).max(1)
    return best.values, best.indices


def _path_shapes(
    emissions: Tensor, lengths: Tensor | None, transitions: Tensor, start: Tensor, end: Tensor
) -> Tensor:
    return emissions.new_empty(emissions.shape[:2], dtype=torch.int64)


autograd.define_in_torch(
    "crf_log_likelihood_viterbi(Tensor emissions, Tensor? lengths, Tensor transitions, "
    "Tensor start, Tensor end) -> Tensor",
    _viterbi,
    _path_shapes,
)
_decode = FusedOp(
    "crf_log_likelihood_decode",
    _decode_definition,
    results=["path"],
    constants=["emissions", "lengths", "transitions", "start", "end", "path"],
    shapes=_path_shapes,
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
