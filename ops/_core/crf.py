"""The linear-chain conditional random field: arguments, and the kernels of tensor code."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ops._core import autograd, checks, sequence_pairs
from ops._errors import ArgumentError, ArgumentTypeError

# ---- checks --------------------------------------------------------------------------------------


class Inputs:
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


def definition(
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


class _Steps(Protocol):
    """The steps of the recursion over all pairs of tags, forward and backward."""

    def after(self, before: Tensor) -> Tensor:
        """The log of the sums over the tag before, ``(B, K)``."""

    def expected(
        self, before: Tensor, after: Tensor, last: Tensor, real: Tensor | None, grad: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The probability of each tag, and ``grad`` times the expected counts of the transitions.

        Args:
            before: the scores before each step, ``(B, T − 1, K)``.
            after: the results of :meth:`after`, likewise.
            last: the probabilities of the last tags, ``(B, K)``.
            real: which steps but the first count, ``(B, T − 1, 1)``; ``None`` if all.
            grad: ``(B, 1, 1)``.
        """


class _Products:
    """Products with exp(T). Each is scaled, and exact if the transitions have a small range."""

    def __init__(self, transitions: Tensor) -> None:
        self._most = transitions.max()
        self._factors = (transitions - self._most).exp()

    def after(self, before: Tensor) -> Tensor:
        top = _top(before)
        return ((before - top).exp_() @ self._factors).log_().add_(top).add_(self._most)

    def expected(
        self, before: Tensor, after: Tensor, last: Tensor, real: Tensor | None, grad: Tensor
    ) -> tuple[Tensor, Tensor]:
        top = _top(before)
        shares = (before - top).exp_()
        sums = (after - (top + self._most)).exp_().clamp_(min=torch.finfo(after.dtype).tiny)
        if real is not None:
            sums.masked_fill_(~real, torch.inf)  # then the ratio is 0
        found, ratios, flow = [last], torch.empty_like(shares), last
        for t in range(before.shape[1] - 1, -1, -1):
            ratio = torch.div(flow, sums[:, t], out=ratios[:, t])
            earlier = (ratio @ self._factors.T).mul_(shares[:, t])
            flow = earlier if real is None else torch.where(real[:, t], earlier, flow)
            found.append(flow)
        pairs = shares.flatten(0, 1).T @ ratios.mul_(grad).flatten(0, 1)
        return torch.stack(found[::-1], 1), pairs * self._factors


class _Logarithms:
    """A logsumexp for each tag, for any transitions."""

    def __init__(self, transitions: Tensor) -> None:
        self._transitions = transitions

    def after(self, before: Tensor) -> Tensor:
        return (before[:, :, None] + self._transitions).logsumexp(1)

    def expected(
        self, before: Tensor, after: Tensor, last: Tensor, real: Tensor | None, grad: Tensor
    ) -> tuple[Tensor, Tensor]:
        found, pairs, flow = [last], torch.zeros_like(self._transitions), last
        for t in range(before.shape[1] - 1, -1, -1):
            shares = (self._transitions + before[:, t, :, None]).sub_(after[:, t, None]).exp_()
            its = flow if real is None else torch.where(real[:, t], flow, 0.0)
            shares = torch.where(its[:, None] > 0, shares * its[:, None], 0.0)
            pairs += (shares * grad).sum(0)
            earlier = shares.sum(2)
            flow = earlier if real is None else torch.where(real[:, t], earlier, flow)
            found.append(flow)
        return torch.stack(found[::-1], 1), pairs


def _top(scores: Tensor) -> Tensor:
    """The largest score over the tags, or 0 if that is infinite."""
    return scores.amax(-1, keepdim=True).nan_to_num_(nan=torch.nan, posinf=0.0, neginf=0.0)


_RANGE = 100.0  # of transitions, up to which no share that counts is lost beside the largest


def _steps_of(transitions: Tensor) -> _Steps:
    # Only a CPU has the answer without waiting.
    if transitions.is_cpu and transitions.max() - transitions.min() <= _RANGE:
        return _Products(transitions)
    return _Logarithms(transitions)


def forward(
    emissions: Tensor, tags: Tensor, lengths: Tensor | None, transitions: Tensor, start: Tensor,
    end: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The values, and the log of the sums over all beginnings, without the last emission."""
    wide, steps = emissions.double(), _steps_of(transitions.double())
    sums = torch.zeros_like(wide, memory_format=torch.contiguous_format)
    sums[:, 0] = start.double()
    for t in range(1, wide.shape[1]):
        after = steps.after(sums[:, t - 1] + wide[:, t - 1])
        sums[:, t] = after if lengths is None else torch.where((t < lengths)[:, None], after, 0.0)
    total = _last(wide, sums, lengths, end).logsumexp(1)
    return _score(emissions, tags, lengths, transitions, start, end) - total, sums


def _last(wide: Tensor, sums: Tensor, lengths: Tensor | None, end: Tensor) -> Tensor:
    """The scores of the labels of the last step that counts."""
    scores = sums + wide
    if lengths is None:
        return scores[:, -1] + end.double()
    pair = torch.arange(len(wide), device=wide.device)
    return scores[pair, (lengths - 1).clamp(min=0)] + end.double()


def backward(
    grad: Tensor, emissions: Tensor, tags: Tensor, lengths: Tensor | None, transitions: Tensor,
    start: Tensor, end: Tensor, value: Tensor, sums: Tensor, needs_emissions: bool,
    needs_transitions: bool, needs_start: bool, needs_end: bool,
) -> list[Tensor]:  # fmt: skip
    """The gradients that are needed: those of the score of the tags, less their expectation."""
    batch, count, labels = emissions.shape
    wide, steps = emissions.double(), _steps_of(transitions.double())
    grad = torch.where(value.isfinite(), grad, torch.nan)[:, None, None]
    given = torch.nn.functional.one_hot(tags.clamp(min=0), labels).double()
    real, end_at = None, torch.full((batch,), count - 1, device=tags.device)
    if lengths is not None:
        real = (torch.arange(count, device=tags.device) < lengths[:, None])[..., None]
        end_at = (lengths - 1).clamp(min=0)
        # Content of padding may be NaN.
        wide, given = torch.where(real, wide, 0.0), torch.where(real, given, 0.0)
    last = _last(wide, sums, lengths, end).softmax(1)
    expected, pairs = steps.expected(
        (sums + wide)[:, :-1], sums[:, 1:], last, None if real is None else real[:, 1:], grad
    )
    of_emissions = grad * (given - expected)
    if real is not None:
        of_emissions = torch.where(real, of_emissions, 0.0)
    final = given[torch.arange(batch, device=tags.device), end_at]
    # A weight of 0 beside a NaN of another sequence is no matter: then all is NaN.
    of_pairs = given[:, :-1].flatten(0, 1).T @ (grad * given[:, 1:]).flatten(0, 1) - pairs
    unknown = grad.isnan().any()
    needed = (
        (of_emissions, needs_emissions),
        (torch.where(unknown, torch.nan, of_pairs), needs_transitions),
        (torch.where(unknown, torch.nan, of_emissions[:, 0].sum(0)), needs_start),
        (torch.where(unknown, torch.nan, (grad[:, 0] * (final - last)).sum(0)), needs_end),
    )
    return [one.to(emissions.dtype) for one, need in needed if need]


def shapes(
    emissions: Tensor, tags: Tensor, lengths: Tensor | None, transitions: Tensor, start: Tensor,
    end: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    value = emissions.new_empty(emissions.shape[:1], dtype=torch.float64)
    return value, emissions.new_empty(emissions.shape, dtype=torch.float64)


# ---- decoding ------------------------------------------------------------------------------------


def decode_definition(
    emissions: Tensor, lengths: Tensor | None, transitions: Tensor, start: Tensor, end: Tensor
) -> Tensor:
    path: Tensor = torch.ops.jitops.crf_log_likelihood_viterbi(
        emissions, lengths, transitions, start, end
    )
    return path


def _viterbi(
    emissions: Tensor, lengths: Tensor | None, transitions: Tensor, start: Tensor, end: Tensor
) -> Tensor:
    count = emissions.shape[1]
    wide, matrix = emissions.double(), transitions.double()
    scores = start.double() + wide[:, 0]
    # Only a CPU has the answer without waiting.
    plain = wide.is_cpu and all(bool((one < torch.inf).all()) for one in (scores, wide, matrix))
    before = []
    for t in range(1, count):
        best, places = _best(scores[:, :, None] + matrix, plain)
        before.append(places)
        best += wide[:, t]
        scores = best if lengths is None else torch.where((t < lengths)[:, None], best, scores)
    _, label = _best(scores + end.double(), plain=False)
    path = [label]
    for t in range(count - 1, 0, -1):
        earlier = before[t - 1].gather(1, label[:, None])[:, 0]
        label = earlier if lengths is None else torch.where(t < lengths, earlier, label)
        path.append(label)
    found = torch.stack(path[::-1], 1)
    if lengths is None:
        return found
    return torch.where(torch.arange(count, device=wide.device) < lengths[:, None], found, -1)


def _best(scores: Tensor, plain: bool) -> tuple[Tensor, Tensor]:
    """The largest along dimension 1, and the first place of it. NaN is below all others.

    ``plain`` says that there is no NaN.
    """
    if not plain:
        scores = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    best = scores.max(1)
    return best.values, best.indices


def path_shapes(
    emissions: Tensor, lengths: Tensor | None, transitions: Tensor, start: Tensor, end: Tensor
) -> Tensor:
    return emissions.new_empty(emissions.shape[:2], dtype=torch.int64)


autograd.define_in_torch(
    "crf_log_likelihood_viterbi(Tensor emissions, Tensor? lengths, Tensor transitions, "
    "Tensor start, Tensor end) -> Tensor",
    _viterbi,
    path_shapes,
)
