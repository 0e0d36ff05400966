"""Soft dynamic time warping of two sequences, with gradients that are right in float32."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ops._core import autograd, checks, sequence_pairs, warping
from ops._core.fused import FusedOp
from ops._core.modules import LossModule
from ops._errors import ArgumentError

__all__ = ["SoftDTW", "soft_dtw", "soft_dtw_alignment", "soft_dtw_from_cost"]

# ---- the public functions and module -------------------------------------------------------------


def soft_dtw(
    x: Tensor,
    y: Tensor,
    gamma: float = 1.0,
    *,
    lengths_x: Tensor | None = None,
    lengths_y: Tensor | None = None,
    bandwidth: int | None = None,
    normalize: bool = False,
) -> Tensor:
    """The soft minimum of the costs of all alignments of two sequences.

    .. math::

        rᵢⱼ = ‖xᵢ − yⱼ‖² + minᵞ(rᵢ₋₁ⱼ₋₁, rᵢ₋₁ⱼ, rᵢⱼ₋₁)
        minᵞ(a, b, c) = −γ log(exp(−a/γ) + exp(−b/γ) + exp(−c/γ))

    The result is r of the last steps of both. It may be negative. For γ → 0 it is the cost of
    dynamic time warping. From M. Cuturi, M. Blondel, "Soft-DTW: a Differentiable Loss Function for
    Time-Series", ICML 2017, arXiv:1703.01541.

    Args:
        x: ``(B, N, D)``, floating point, any strides; or ``(N, D)``, a single sequence. Sequences
            of numbers need a last dimension of size 1: ``x[..., None]``.
        y: ``(B, M, D)``, or ``(M, D)``, like ``x``.
        gamma: γ, the smoothing; greater than 0.
        lengths_x: ``(B,)``, integers from 1 to N: how many steps of each sequence count. The rest
            is padding. By default all N.
        lengths_y: the same for ``y``, from 1 to M.
        bandwidth: w of the Sakoe-Chiba band: step i of ``x`` may meet step j of ``y`` only if
            ``|i − j| ≤ w``, in steps, also for unequal lengths. So w must be at least the
            difference of the lengths of each pair. By default there is no band.
        normalize: return the divergence s(x, y) − (s(x, x) + s(y, y)) / 2 instead. But for
            rounding it is never negative. It is 0 for equal sequences. The lengths may differ. From
            M. Blondel, A. Mensch, J.-P. Vert, "Differentiable Divergences Between Time Series",
            AISTATS 2021, arXiv:2010.08354.

    Returns:
        ``(B,)``, or a scalar for single sequences; in the dtype of ``x``.

    Raises:
        ArgumentTypeError: sequences that are not tensors of one dtype among float64, float32,
            bfloat16 and float16; lengths that are not tensors of integers; a ``gamma`` that is no
            number, a ``bandwidth`` that is no integer.
        ArgumentError: shapes that do not fit together, different devices, sequences without a
            step, lengths out of range, a band too narrow for a pair of lengths, a ``gamma`` that
            is not above 0 or not finite. On a GPU the lengths are not waited for: a pair whose
            lengths are out of range, or too different for the band, has a NaN value.
        BackendUnavailableError: the requested back end cannot run.

    Gradients:
        For ``x`` and ``y``, of any order. Padding has the gradient 0, and no influence, even if it
        is NaN. A pair whose value is not finite has NaN gradients. Forward mode,
        :mod:`torch.func` and derivatives of second order run on the pure-torch path.

    Numerics:
        Costs are sums of squared differences in float64. The weights of the recursion are computed
        from them without differences of large numbers. So float32 gradients are within 1e-4 of
        those in float64, relative to the largest, for any ``gamma`` and length. Compiled float32
        values are within 1e-7 γ (N + M), or within the rounding of the value if that is larger.
        Half precisions accumulate in float32, and under autocast they are cast to it. Compiled
        kernels are bitwise deterministic for any number of threads.

    Memory:
        Compiled for a CPU, every 32nd row of r is kept: 12 bytes of each 32 cells, of those within
        the band alone. The backward pass computes the rest again. On CUDA the backward pass takes
        a matrix of N × M numbers for each pair, and the weights of 256 rows. The pure-torch path
        keeps two numbers a cell. Derivatives of second order take about 400 bytes a cell, and
        50 more for each of the D features.
    """
    x, y, single = sequence_pairs.sequences(x, y)
    gamma, band = _gamma(gamma), sequence_pairs.band(bandwidth)
    lengths = sequence_pairs.lengths(x, y.shape[1], lengths_x, lengths_y, band, single)
    loss = _fused(x, y, lengths, gamma, band)
    if normalize:
        of_x, of_y = (None, None) if lengths is None else (lengths[[0, 0]], lengths[[1, 1]])
        loss = loss - (_fused(x, x, of_x, gamma, band) + _fused(y, y, of_y, gamma, band)) / 2
    return _returned(loss, x.dtype, single)


def soft_dtw_from_cost(
    cost: Tensor,
    gamma: float = 1.0,
    *,
    lengths_x: Tensor | None = None,
    lengths_y: Tensor | None = None,
    bandwidth: int | None = None,
) -> Tensor:
    """:func:`soft_dtw` of a given matrix of costs: for another distance than the squared Euclidean.

    Args:
        cost: ``(B, N, M)``, or ``(N, M)`` for a single pair. Costs may be negative. An infinite
            cost forbids its cell.
        gamma, lengths_x, lengths_y, bandwidth: see :func:`soft_dtw`.

    Returns:
        ``(B,)``, or a scalar for a single matrix; in the dtype of ``cost``.

    Its gradient is the soft alignment: how much of all paths meets each cell. Errors, numerics and
    gradients are those of :func:`soft_dtw`.
    """
    cost, single = sequence_pairs.costs(cost)
    gamma, band = _gamma(gamma), sequence_pairs.band(bandwidth)
    lengths = sequence_pairs.lengths(cost, cost.shape[2], lengths_x, lengths_y, band, single)
    return _returned(_fused_from_cost(cost, lengths, gamma, band), cost.dtype, single)


def soft_dtw_alignment(
    x: Tensor,
    y: Tensor,
    gamma: float = 1.0,
    *,
    lengths_x: Tensor | None = None,
    lengths_y: Tensor | None = None,
    bandwidth: int | None = None,
) -> Tensor:
    """The soft alignment of two sequences: the gradient of :func:`soft_dtw` for the costs.

    An element is the share of all alignments, weighted by exp(−cost/γ), that meets the cell.

    Args:
        x, y, gamma, lengths_x, lengths_y, bandwidth: see :func:`soft_dtw`.

    Returns:
        ``(B, N, M)``, or ``(N, M)`` for single sequences; in the dtype of ``x``. It is
        differentiable.

    Errors and numerics are those of :func:`soft_dtw`. The costs take N × M numbers in float64.
    Graphs of :func:`torch.compile` and :mod:`torch.func` run it on the pure-torch path.
    :func:`torch.export` cannot hold it.
    """
    compiling = torch.compiler.is_compiling()
    if not compiling and torch.is_inference_mode_enabled():  # in which no gradient can be computed
        with torch.inference_mode(False), torch.no_grad():
            return soft_dtw_alignment(
                x, y, gamma, lengths_x=lengths_x, lengths_y=lengths_y, bandwidth=bandwidth
            )
    x, y, single = sequence_pairs.sequences(x, y)
    gamma, band = _gamma(gamma), sequence_pairs.band(bandwidth)
    lengths = sequence_pairs.lengths(x, y.shape[1], lengths_x, lengths_y, band, single)

    def total(cost: Tensor) -> Tensor:
        loss: Tensor = _fused_from_cost(cost, lengths, gamma, band)
        return loss.sum()

    cost = warping.squared_distances(warping.masked(x, lengths), warping.masked(y, lengths, (1,)))
    # Graphs and transforms cannot hold a call of torch.autograd.
    if compiling or autograd.needs_torch_path():
        alignment = torch.func.grad(total)(cost)
    else:
        recorded = torch.is_grad_enabled() and cost.requires_grad
        with torch.enable_grad():
            cost = cost if recorded else cost.detach().requires_grad_()
            (alignment,) = torch.autograd.grad(total(cost), cost, create_graph=recorded)
    alignment = alignment.to(x.dtype)
    return alignment[0] if single else alignment


class SoftDTW(LossModule):
    """:func:`soft_dtw` as a module, with its parameters set once.

    Args:
        gamma, bandwidth, normalize: see :func:`soft_dtw`.
    """

    function = staticmethod(soft_dtw)

    def __init__(
        self, gamma: float = 1.0, *, bandwidth: int | None = None, normalize: bool = False
    ) -> None:
        super().__init__(gamma=gamma, normalize=normalize)
        self.bandwidth = bandwidth
        self._parameter_names = ("gamma", "bandwidth", "normalize")
        _gamma(gamma)
        sequence_pairs.band(bandwidth)

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        lengths_x: Tensor | None = None,
        lengths_y: Tensor | None = None,
    ) -> Tensor:
        """The losses of ``(B, N, D)`` and ``(B, M, D)`` sequences."""
        loss: Tensor = self.loss(x, y, lengths_x=lengths_x, lengths_y=lengths_y)
        return loss


# ---- the declarations ----------------------------------------------------------------------------


def _gamma(gamma: float) -> float:
    gamma = checks.check_number("gamma", gamma)
    if not 0 < gamma < math.inf:
        raise ArgumentError(f"gamma must be a finite number greater than 0, got {gamma}")
    return gamma


def _returned(loss: Tensor, dtype: torch.dtype, single: bool) -> Tensor:
    loss = loss.to(dtype)
    return loss[0] if single else loss


_STRIP_ROWS = 32  # kStripRows of soft_dtw.h


def _saved(first: Tensor, rows: int, cols: int, bandwidth: int) -> tuple[Tensor, ...]:
    """The value, and the rows that the compiled kernels keep, with no content."""
    width = cols if bandwidth < 0 else min(cols, 2 * bandwidth + 1)
    kept = (first.shape[0], (rows - 1) // _STRIP_ROWS, width)
    return (
        first.new_empty((first.shape[0],), dtype=torch.float64),
        first.new_empty(kept, dtype=warping.wide(first.dtype)),
        first.new_empty(kept, dtype=torch.float64),
    )


def _saved_weights(first: Tensor, rows: int, cols: int, bandwidth: int) -> tuple[Tensor, ...]:
    """The value, and the weights that the kernels of tensor code keep, with no content."""
    count = first.shape[0] * warping.cells(rows, cols, bandwidth)
    return (
        first.new_empty((first.shape[0],), dtype=torch.float64),
        *(first.new_empty((count,), dtype=warping.wide(first.dtype)) for _ in range(2)),
    )


def _definition(
    x: Tensor, y: Tensor, lengths: Tensor | None, gamma: float, bandwidth: int
) -> Tensor:
    x, y = warping.masked(x, lengths), warping.masked(y, lengths, (1,))
    return warping.definition(warping.squared_distances(x, y), lengths, gamma, bandwidth)


def _forward(
    x: Tensor, y: Tensor, lengths: Tensor | None, gamma: float, bandwidth: int
) -> tuple[Tensor, ...]:
    source = warping.Sequences(x, y, lengths)
    return warping.forward(source, lengths, gamma, bandwidth, warping.wide(x.dtype))


def _backward(
    grad: Tensor, x: Tensor, y: Tensor, lengths: Tensor | None, value: Tensor, above: Tensor,
    before: Tensor, gamma: float, bandwidth: int, needs_x: bool, needs_y: bool,
) -> list[Tensor]:  # fmt: skip
    source = warping.Sequences(x, y, lengths)
    gradients = warping.backward(source, grad, lengths, value, above, before, bandwidth)
    return [
        one.to(x.dtype).contiguous()
        for one, need in zip(gradients, (needs_x, needs_y), strict=True)
        if need
    ]


def _definition_from_cost(
    cost: Tensor, lengths: Tensor | None, gamma: float, bandwidth: int
) -> Tensor:
    return warping.definition(warping.masked(cost, lengths, (0, 1)), lengths, gamma, bandwidth)


def _forward_from_cost(
    cost: Tensor, lengths: Tensor | None, gamma: float, bandwidth: int
) -> tuple[Tensor, ...]:
    source = warping.Costs(cost, lengths)
    return warping.forward(source, lengths, gamma, bandwidth, warping.wide(cost.dtype))


def _backward_from_cost(
    grad: Tensor, cost: Tensor, lengths: Tensor | None, value: Tensor, above: Tensor,
    before: Tensor, gamma: float, bandwidth: int, needs_cost: bool,
) -> list[Tensor]:  # fmt: skip
    if not needs_cost:
        return []
    source = warping.Costs(cost, lengths)
    (gradient,) = warping.backward(source, grad, lengths, value, above, before, bandwidth)
    return [gradient.to(cost.dtype)]


# The kernels of tensor code keep two weights in the place of mantissas and exponents.
_fused = FusedOp(
    "soft_dtw",
    _definition,
    results=["value"],
    saved=["mantissas", "exponents"],
    backward=["x", "y", "lengths", "value", "mantissas", "exponents", "gamma", "bandwidth"],
    constants=["lengths"],
    shapes=lambda x, y, lengths, gamma, bandwidth: _saved(x, x.shape[1], y.shape[1], bandwidth),
    tensor_code=(_forward, _backward),
    opaque_shapes=lambda x, y, lengths, gamma, bandwidth: _saved_weights(
        x, x.shape[1], y.shape[1], bandwidth
    ),
    title="SoftDTW",
)
_fused_from_cost = FusedOp(
    "soft_dtw_from_cost",
    _definition_from_cost,
    results=["value"],
    saved=["mantissas", "exponents"],
    backward=["cost", "lengths", "value", "mantissas", "exponents", "gamma", "bandwidth"],
    constants=["lengths"],
    shapes=lambda cost, lengths, gamma, bandwidth: _saved(
        cost, cost.shape[1], cost.shape[2], bandwidth
    ),
    tensor_code=(_forward_from_cost, _backward_from_cost),
    opaque_shapes=lambda cost, lengths, gamma, bandwidth: _saved_weights(
        cost, cost.shape[1], cost.shape[2], bandwidth
    ),
    source="soft_dtw",
    title="SoftDTWFromCost",
)


def samples() -> Iterator[checks.Sample]:
    """Where ``jitops check`` checks the gradients."""
    x, y = torch.randn(2, 3, 2), torch.randn(2, 4, 2)
    yield "defaults", SoftDTW(), (x, y)
    yield "bandwidth=1, normalize=True", SoftDTW(0.5, bandwidth=1, normalize=True), (x, y)
    yield "of costs", soft_dtw_from_cost, (torch.randn(2, 4, 5),)
