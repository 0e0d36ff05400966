"""Monotonic alignment search: the best hard alignment of text tokens and audio frames."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ops._core import autograd, checks, sequence_pairs
from ops._core.fused import FusedOp
from ops._errors import ArgumentError

__all__ = ["monotonic_alignment_search"]


def monotonic_alignment_search(
    scores: Tensor,
    text_lengths: Tensor | None = None,
    audio_lengths: Tensor | None = None,
) -> Tensor:
    """The alignment of text and audio with the largest sum of scores.

    .. math::

        qᵢⱼ = sᵢⱼ + max(qᵢ₋₁ⱼ₋₁, qᵢⱼ₋₁)

    q is the best sum up to token i and frame j. Each frame has one token. The path begins at the
    first token, ends at the last one, and skips none. From J. Kim, S. Kim, J. Kong, S. Yoon,
    "Glow-TTS: A Generative Flow for Text-to-Speech via Monotonic Alignment Search", NeurIPS 2020,
    arXiv:2005.11129, algorithm 1.

    Args:
        scores: s, ``(B, T_text, T_audio)``, floating point, any strides: how well a token fits a
            frame, for example a log-likelihood. Or ``(T_text, T_audio)``, a single pair.
        text_lengths: ``(B,)``, integers from 0 to T_text: how many tokens of each pair count. The
            rest is padding. By default all T_text.
        audio_lengths: ``(B,)``, integers from 0 to T_audio: how many frames count. By default all.
            A pair has at least as many frames as tokens.

    Returns:
        The path, in the shape and dtype of ``scores``: 1 where a frame is aligned with a token, and
        0 elsewhere. Its sum over the frames is the duration of each token. A pair without tokens
        has no path: all is 0.

    Raises:
        ArgumentTypeError: scores that are not a tensor of float64, float32, bfloat16 or float16;
            lengths that are not tensors of integers.
        ArgumentError: shapes that do not fit together, lengths out of range, a text that is longer
            than its audio. On a GPU the lengths are not waited for: the path of a pair whose
            lengths are wrong is NaN.
        BackendUnavailableError: the requested back end cannot run.

    Gradients:
        None: the path is a constant, as if the scores were detached. A loss may multiply it with
        tensors that have gradients.

    Numerics:
        Sums run in the dtype of the scores, in float32 for half precisions, in the order of the
        frames. So all back ends return the same path, for any number of threads. Of two equal sums
        the path stays on its token. It moves to the next token only for a sum that is greater. No
        sum is greater than NaN, or less: there it stays too. Under autocast half precisions are
        cast to float32.

    Memory:
        Compiled kernels keep one bit for each score, the pure-torch path keeps a byte.

    ``maximum_path(value, mask)`` of Glow-TTS, with ``(B, T_text, T_audio)`` tensors, is
    ``monotonic_alignment_search(value, mask[:, :, 0].sum(1).long(), mask[:, 0].sum(1).long())``.
    In VITS the axes are swapped: use ``value.mT`` and ``mask.mT``, and ``.mT`` of the result.
    """
    scores = checks.widened_under_autocast({"scores": scores})["scores"]
    checks.same_kind(scores=scores)
    if scores.dim() not in (2, 3):
        raise ArgumentError(
            f"scores must have shape (B, T_text, T_audio) or (T_text, T_audio), "
            f"got {list(scores.shape)}"
        )
    single = scores.dim() == 2
    batch = scores.detach()[None] if single else scores.detach()
    path: Tensor = _fused(batch, _lengths(batch, text_lengths, audio_lengths, single))
    return path[0] if single else path


# ---- lengths -------------------------------------------------------------------------------------


def _lengths(
    scores: Tensor, text_lengths: Tensor | None, audio_lengths: Tensor | None, single: bool
) -> Tensor | None:
    """The lengths of all pairs, ``(2, B)``, or ``None`` if there is no padding."""
    _, tokens, frames = scores.shape
    if text_lengths is None and audio_lengths is None:
        _check_fits(tokens, frames)
        return None
    text = sequence_pairs.one_length("text_lengths", text_lengths, scores, tokens, single)
    audio = sequence_pairs.one_length("audio_lengths", audio_lengths, scores, frames, single)
    found: Tensor = torch.ops.jitops.monotonic_alignment_search_lengths(text, audio, tokens, frames)
    return found


def _check_fits(tokens: int, frames: int) -> None:
    if tokens > frames:
        raise ArgumentError(
            f"text_lengths must be at most audio_lengths, because each token needs a frame, "
            f"got {tokens} and {frames}"
        )


def _checked_lengths(text: Tensor, audio: Tensor, tokens: int, frames: int) -> Tensor:
    """Both lengths. Those of a wrong pair become -1 where nobody waits for an error."""
    both = torch.stack((text, audio))
    for name, one, most in (("text_lengths", text, tokens), ("audio_lengths", audio, frames)):
        both.masked_fill_(sequence_pairs.out_of_range(name, one, 0, most), -1)
    wrong = text > audio
    if text.is_cpu and wrong.any():
        _check_fits(int(text[wrong][0]), int(audio[wrong][0]))
    return both.masked_fill_(wrong, -1)


autograd.define_in_torch(
    "monotonic_alignment_search_lengths(Tensor text, Tensor audio, SymInt tokens, SymInt frames)"
    " -> Tensor",
    _checked_lengths,
    lambda text, audio, tokens, frames: text.new_empty(2, *text.shape),
)


# ---- the search ----------------------------------------------------------------------------------


def _definition(scores: Tensor, lengths: Tensor | None) -> Tensor:
    path: Tensor = torch.ops.jitops.monotonic_alignment_search_path(scores, lengths)
    return path


def _search(scores: Tensor, lengths: Tensor | None) -> Tensor:
    """Frame by frame, for all tokens of a batch at once."""
    batch, tokens, frames = scores.shape
    path = torch.zeros_like(scores, memory_format=torch.contiguous_format)
    if path.numel() == 0:
        return path
    token = torch.arange(tokens, device=scores.device)
    by_frame = checks.widened(scores).permute(2, 0, 1).contiguous()
    moves = torch.empty(by_frame.shape, dtype=torch.bool, device=scores.device)
    best = by_frame[0]
    # Tokens beyond the frame's number cannot be reached. No path reads their sums.
    for frame in range(1, frames):
        before = F.pad(best[:, :-1], (1, 0), value=-torch.inf)
        moved = torch.logical_or(before > best, token == frame, out=moves[frame])
        best = torch.where(moved, before, best).add_(by_frame[frame])
    if lengths is None:
        lengths = torch.tensor([[tokens], [frames]], device=scores.device).expand(2, batch)
    at = (lengths[0] - 1).clamp(min=0)
    real = torch.arange(frames, device=scores.device)[:, None] < lengths[1]
    real &= lengths[0] > 0
    taken = torch.empty((frames, batch), dtype=torch.int64, device=scores.device)
    moves[0] = False
    moves &= real[:, :, None]
    for frame in range(frames - 1, -1, -1):
        taken[frame] = at
        at = at - moves[frame].gather(1, at[:, None])[:, 0].long()
    path.scatter_(1, taken.T[:, None], real.T[:, None].to(path.dtype))
    return path.masked_fill_((lengths[0] < 0).view(-1, 1, 1), torch.nan)


autograd.define_in_torch(
    "monotonic_alignment_search_path(Tensor scores, Tensor? lengths) -> Tensor",
    _search,
    lambda scores, lengths: torch.empty_like(scores, memory_format=torch.contiguous_format),
)

_fused = FusedOp(
    "monotonic_alignment_search",
    _definition,
    results=["path"],
    constants=["scores", "lengths", "path"],
    shapes=lambda scores, lengths: torch.empty_like(scores, memory_format=torch.contiguous_format),
)


def samples() -> Iterator[checks.Sample]:
    """Where ``jitops check`` checks the gradients: of the scores along the path."""

    def of_the_path(scores: Tensor) -> Tensor:
        return (scores * monotonic_alignment_search(scores)).sum()

    yield "scores of the path", of_the_path, (torch.randn(2, 3, 5),)
