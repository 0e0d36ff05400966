"""``python docs/pictures.py``: draw the pictures of the pages into ``docs/images``.

Each function draws one picture, and its name is the name of the file.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Patch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "examples")]

import ops  # noqa: E402

DPI = 110
BLUE, ORANGE, GREY = "#3b6fb6", "#d9480f", "#666666"


def improved_triplet_loss() -> Figure:
    """The loss of one triplet over its two distances, and the regions between the clamps."""
    t1, t2, beta = -1.0, 0.7, 0.5
    pos, neg = np.meshgrid(np.linspace(0, 3, 301), np.linspace(0, 4, 301))
    loss = np.maximum(pos - neg, t1) + beta * np.maximum(pos, t2)
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    levels = axes.contourf(pos, neg, loss, 16, cmap="viridis")
    figure.colorbar(levels, label="loss")
    axes.axline((0, -t1), slope=1, color="white", linestyle="--")
    axes.axvline(t2, color="white", linestyle=":")
    axes.text(1.6, 0.6, "pull the positive,\npush the negative", color="black", ha="center")
    axes.text(1.4, 3.4, "pull the positive", color="white", ha="center")
    axes.text(0.33, 2.6, "no gradient", color="white", ha="center")
    axes.text(0.35, 0.3, "pull, push", color="white", ha="center")
    axes.set(xlim=(0, 3), ylim=(0, 4), xlabel="distance to the positive, $d^+$")
    axes.set(ylabel="distance to the negative, $d^-$")
    axes.set_title(f"t1 = {t1}, t2 = {t2}, beta = {beta}", fontsize=10)
    return figure


def batch_hard_triplet_loss() -> Figure:
    """Embeddings of three classes, and the triplet of one anchor."""
    torch.manual_seed(4)
    centres = torch.tensor([[0.0, 0.0], [2.2, 0.6], [0.9, 2.0]])
    labels = torch.arange(24) % 3
    points = centres[labels] + 0.55 * torch.randn(24, 2)
    anchor = int((points - centres[0]).norm(dim=1).argmin())
    distances = (points - points[anchor]).norm(dim=1)
    positive = int(distances.masked_fill(labels != labels[anchor], -1).argmax())
    negative = int(distances.masked_fill(labels == labels[anchor], 99).argmin())
    figure = Figure(figsize=(5.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for label, color in enumerate((BLUE, ORANGE, GREY)):
        axes.scatter(*points[labels == label].T, color=color, label=f"label {label}", zorder=3)
    for other, color, text in ((positive, BLUE, "$d^+$"), (negative, ORANGE, "$d^-$")):
        axes.plot(*points[[anchor, other]].T, color=color, linewidth=2)
        axes.annotate(text, points[[anchor, other]].mean(0), fontsize=13)
    axes.scatter(*points[anchor], s=160, facecolors="none", edgecolors="black", zorder=4)
    axes.annotate("anchor", points[anchor], xytext=(-46, -14), textcoords="offset points")
    axes.set(xticks=[], yticks=[], aspect="equal")
    axes.legend(loc="upper left")
    return figure


def batch_semi_hard_triplet_loss() -> Figure:
    """The negatives of one anchor and one positive, by their distance."""
    positive, margin, top = 1.0, 0.5, 2.2
    negatives = torch.tensor([0.45, 0.75, 1.12, 1.3, 1.42, 1.7, 1.95])
    figure = Figure(figsize=(6.4, 2.2), layout="constrained")
    axes = figure.subplots()
    bands = (("hard", 0.0, positive), ("semi-hard", positive, positive + margin),
             ("easy", positive + margin, top))  # fmt: skip
    for (text, begin, end), color in zip(bands, ("white", ORANGE, "white"), strict=True):
        axes.axvspan(begin, end, color=color, alpha=0.2, linewidth=0)
        axes.text((begin + end) / 2, 0.75, text, ha="center", fontsize=12)
    axes.scatter(negatives, torch.zeros(7), color=ORANGE, zorder=3, label="negatives")
    axes.scatter([positive], [0], color=BLUE, zorder=3, label="positive")
    axes.axvline(positive, color=BLUE, linewidth=1)
    axes.axvline(positive + margin, color=GREY, linewidth=1, linestyle="--")
    axes.set(xlim=(0, top), ylim=(-0.6, 1.1), yticks=[], xticks=[0, positive, positive + margin])
    axes.set_xticklabels(["anchor", "$d^+$", "$d^+$ + margin"])
    axes.set_xlabel("distance from the anchor")
    axes.legend(loc="lower left", ncols=2)
    return figure


def chamfer_distance() -> Figure:
    """The points of two clouds, and for each the nearest one of the other cloud."""
    torch.manual_seed(2)
    angle = torch.linspace(0, 2 * np.pi, 23)[:-1]
    circle = torch.stack([angle.cos(), angle.sin()], 1)
    x = 1.25 * circle + 0.06 * torch.randn(22, 2)
    y = torch.cat([circle[:17] * torch.tensor([1.0, 0.8]), torch.tensor([[0.1, 0.1]])])
    _, _, of_x, of_y = ops.chamfer_distance(x[None], y[None], return_indices=True)
    figure = Figure(figsize=(8.4, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, begin, end, color, title in (
        (left, x, y[of_x[0]], BLUE, "each point of x and the nearest of y"),
        (right, y, x[of_y[0]], ORANGE, "each point of y and the nearest of x"),
    ):
        for pair in zip(begin, end, strict=True):
            axes.plot(*torch.stack(pair).T, color=color, linewidth=1.5)
        axes.scatter(*x.T, color=BLUE, s=24, zorder=3, label="x")
        axes.scatter(*y.T, color=ORANGE, s=24, zorder=3, label="y")
        axes.set(xticks=[], yticks=[], aspect="equal")
        axes.set_title(title, fontsize=10)
    left.legend(loc="upper left")
    return figure


def ssim() -> Figure:
    """A picture, a copy with a blurred, a noisy and a brighter part, and the map of SSIM."""
    y, x = np.mgrid[:144, :144] / 143
    picture = 0.5 + 0.25 * np.sin(60 * x * x) + 0.25 * np.sin(50 * y * (1 - x))
    original = torch.from_numpy(picture).float()[None, None]
    distorted = original.clone()
    blurred = torch.nn.functional.avg_pool2d(original, 7, stride=1, padding=3)
    distorted[..., :48] = blurred[..., :48]
    distorted[..., 48:96] += 0.15 * torch.randn(144, 48, generator=torch.Generator().manual_seed(0))
    distorted[..., 96:] += 0.1
    similarity = ops.ssim_map(distorted, original, data_range=1.0, padding="reflect")
    figure = Figure(figsize=(9.6, 3.0), layout="constrained")
    pictures = {
        "original": (original, "gray"),
        "blurred, noisy, brighter": (distorted, "gray"),
        "SSIM of each window": (similarity, "viridis"),
    }
    for axes, (title, (values, colors)) in zip(
        figure.subplots(1, 3), pictures.items(), strict=True
    ):
        shown = axes.imshow(values[0, 0], cmap=colors, vmin=0, vmax=1)
        axes.set_title(title, fontsize=10)
        axes.set_axis_off()
    figure.colorbar(shown, ax=axes)
    return figure


def lncc_loss() -> Figure:
    """A scan, an inverted copy of which one half is bent, and the correlation of windows."""
    y, x = np.mgrid[:96, :96] / 95

    def scan(y: np.ndarray, x: np.ndarray) -> np.ndarray:
        wide = (x - 0.5) ** 2 / 0.16 + (y - 0.5) ** 2 / 0.2 < 1
        inner = (x - 0.38) ** 2 / 0.02 + (y - 0.45) ** 2 / 0.04 < 1
        return 0.2 * wide + 0.4 * inner + 0.1 * wide * np.sin(40 * x * y)

    fixed = scan(y, x)
    bend = 0.03 * (x > 0.5) * np.sin(np.pi * y)  # the right half alone does not match
    moving = 0.9 - 0.8 * scan(y + bend, x)
    images = [torch.from_numpy(one)[None, None] for one in (moving, fixed)]
    loss = ops.lncc_loss(*images, kernel_size=9, reduction="none")
    figure = Figure(figsize=(9.6, 3.0), layout="constrained")
    pictures = {
        "fixed": (fixed, "gray"),
        "moving: inverted, the right half bent": (moving, "gray"),
        "−loss of each window": (-loss[0, 0], "viridis"),
    }
    for axes, (title, (values, colors)) in zip(
        figure.subplots(1, 3), pictures.items(), strict=True
    ):
        shown = axes.imshow(values, cmap=colors, vmin=0, vmax=1)
        axes.set_title(title, fontsize=10)
        axes.set_axis_off()
    figure.colorbar(shown, ax=axes)
    return figure


def hausdorff_dt_loss() -> Figure:
    """A prediction and a target, the weights, and the loss of each pixel."""
    from scipy.ndimage import distance_transform_edt as distance

    y, x = np.mgrid[:48, :48]
    target = ((x - 20) ** 2 + (y - 24) ** 2 < 120).astype(float)
    prediction = np.maximum(
        1 / (1 + np.exp((np.hypot(x - 23, y - 22) - 11) / 1.2)),
        0.9 * (np.hypot(x - 41, y - 8) < 3),
    )
    weights = sum((distance(m > 0.5) + distance(m <= 0.5)) ** 2 for m in (prediction, target))
    pictures = {
        "prediction p": prediction,
        "target q": target,
        "weight $d_p^2 + d_q^2$": weights,
        "loss of each pixel, root": np.abs(prediction - target) * np.sqrt(weights),
    }
    figure = Figure(figsize=(9.6, 2.6), layout="constrained")
    for axes, (title, values) in zip(figure.subplots(1, 4), pictures.items(), strict=True):
        axes.imshow(values, cmap="magma")
        axes.set_title(title, fontsize=10)
        axes.set_axis_off()
    return figure


def soft_dtw() -> Figure:
    """Two sequences, their soft alignments for two values of gamma, and the best path."""
    time = torch.linspace(0, 1, 40, dtype=torch.float64)
    x = torch.sin(2 * np.pi * time)[:, None]
    y = torch.sin(2 * np.pi * time[::2] ** 1.8)[:, None]
    best = ops.soft_dtw_alignment(x, y, 1e-9).nonzero()
    figure = Figure(figsize=(9.6, 3.4), layout="constrained")
    left, *panels = figure.subplots(1, 3, width_ratios=(1.2, 1, 1))
    left.plot(x, color=BLUE, marker=".", label="x")
    left.plot(y - 2.5, color=ORANGE, marker=".", label="y, lower by 2.5")
    for i, j in best[::3]:
        left.plot([i, j], [x[i], y[j] - 2.5], color=GREY, linewidth=0.5)
    left.set(xlabel="step", yticks=[])
    left.legend(fontsize=9)
    for axes, gamma in zip(panels, (0.1, 2.0), strict=True):
        axes.imshow(ops.soft_dtw_alignment(x, y, gamma), cmap="Blues", aspect="auto", vmin=0)
        axes.plot(best[:, 1], best[:, 0], color=ORANGE, linewidth=1, label="best path")
        axes.set(xlabel="step of y", ylabel="step of x")
        axes.set_title(f"gamma = {gamma}", fontsize=10)
    panels[0].legend(loc="lower left", fontsize=9)
    return figure


def monotonic_alignment_search() -> Figure:
    """Scores of tokens and frames, and the best path."""
    torch.manual_seed(1)
    tokens, frames = torch.arange(8.0)[:, None], torch.arange(30.0)
    scores = -(tokens - 8 * (frames / 30) ** 1.5).square() + 4 * torch.randn(8, 30)
    path = ops.monotonic_alignment_search(scores)
    figure = Figure(figsize=(7.2, 2.8), layout="constrained")
    axes = figure.subplots()
    axes.imshow(scores, cmap="Blues", aspect="auto", vmin=-40)
    axes.step(frames, path.argmax(0), where="mid", color=ORANGE, linewidth=2, label="best path")
    axes.set(xlabel="frame", ylabel="token")
    axes.legend(loc="lower left", fontsize=9)
    return figure


def set_matching_loss() -> Figure:
    """A matrix of costs and the pairs of the least cost."""
    torch.manual_seed(3)
    cost = torch.rand(1, 6, 4)
    matching = ops.set_matching_loss(cost, reduction="sum")
    figure = Figure(figsize=(4.4, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.imshow(cost[0], cmap="Blues", vmin=-0.2, vmax=1.4)
    for row in range(6):
        for column in range(4):
            axes.text(column, row, f"{cost[0, row, column]:.2f}", ha="center", va="center")
    for row, column in zip(matching.prediction, matching.target, strict=True):
        corner = (float(column) - 0.45, float(row) - 0.45)
        axes.add_patch(
            FancyBboxPatch(corner, 0.9, 0.9, "round,pad=0", fill=False, edgecolor=ORANGE, lw=3)
        )
    axes.set(xticks=range(4), yticks=range(6), xlabel="target", ylabel="prediction")
    axes.set_title(f"least cost {matching.loss.item():.2f}", fontsize=10)
    return figure


def _matrix(axes: Axes, kinds: np.ndarray, title: str, names: tuple[str, str]) -> None:
    """A matrix of pairs: negatives 0, positives 1, left out 2."""
    axes.imshow(kinds, cmap=ListedColormap(["#dbe5f3", ORANGE, "white"]), vmin=0, vmax=2)
    axes.set_xticks(np.arange(kinds.shape[1] + 1) - 0.5, [])
    axes.set_yticks(np.arange(kinds.shape[0] + 1) - 0.5, [])
    axes.grid(color=GREY, linewidth=0.6)
    axes.tick_params(length=0)
    axes.set(ylabel=names[0], xlabel=names[1])
    axes.set_title(title, fontsize=10)
    for row, column in zip(*np.nonzero(kinds == 2), strict=True):
        axes.text(column, row, "×", ha="center", va="center", color=GREY)


def _legend(figure: Figure, names: tuple[str, ...]) -> None:
    colors = (ORANGE, "#dbe5f3", "white")
    patches = [
        Patch(facecolor=color, edgecolor=GREY, label=name)
        for color, name in zip(colors, names, strict=True)
    ]
    figure.legend(handles=patches, loc="outside lower center", ncols=3, fontsize=9)


def info_nce_loss() -> Figure:
    """The pairs of queries and keys, and those of both views with each other."""
    labels = np.array([0, 1, 2, 1, 3])
    kinds = 2 * (labels[:, None] == labels)
    np.fill_diagonal(kinds, 1)
    own, other = 2 * np.eye(5, dtype=int), np.eye(5, dtype=int)
    figure = Figure(figsize=(8.2, 4.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    _matrix(left, kinds, "one_way, symmetric, sigmoid", ("query", "key"))
    views = np.block([[own, other], [other, own]])
    _matrix(right, views, "two_views", ("query, key", "query, key"))
    _legend(figure, ("positive", "negative", "left out: equal labels, or the row itself"))
    return figure


def supcon_loss() -> Figure:
    """The pairs of a batch with three classes."""
    labels = np.array([0, 0, 0, 1, 1, 2, 2, 2])
    kinds = (labels[:, None] == labels).astype(int)
    np.fill_diagonal(kinds, 2)
    figure = Figure(figsize=(4.6, 4.8), layout="constrained")
    _matrix(figure.subplots(), kinds, "labels 0 0 0 1 1 2 2 2", ("anchor", "candidate"))
    _legend(figure, ("positive", "negative", "the anchor"))
    return figure


def lltm() -> Figure:
    """The data flow of one step."""
    figure = Figure(figsize=(8.4, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(0, 12.6), ylim=(0, 5))
    line = {"arrowstyle": "->", "color": GREY, "lw": 1.5}
    axes.set_axis_off()

    def box(x: float, y: float, text: str, colour: str = BLUE, width: float = 1.5) -> None:
        axes.add_patch(
            FancyBboxPatch(
                (x - width / 2, y - 0.35), width, 0.7, "round,pad=0.05", fc="white", ec=colour, lw=2
            )
        )
        axes.text(x, y, text, ha="center", va="center", fontsize=11)

    def arrow(start: tuple[float, float], end: tuple[float, float]) -> None:
        axes.annotate("", end, start, arrowprops=line)

    box(1, 3.6, "h, x", GREY)
    box(3.4, 3.6, "W [h; x] + b", BLUE, 2.1)
    for y, gate in ((4.6, r"$\sigma$(i)"), (3.6, "elu(z)"), (1.2, r"$\sigma$(o)")):
        box(6, y, gate)
        arrow((4.55, 3.6), (5.15, y))
    box(1, 2.4, "c", GREY)
    box(8.2, 3.6, r"$\times$", ORANGE, 0.6)
    box(8.2, 2.4, "+", ORANGE, 0.6)
    box(10, 2.4, "tanh")
    box(10, 1.2, r"$\times$", ORANGE, 0.6)
    box(11.8, 2.4, "c'", GREY, 0.8)
    box(11.8, 1.2, "h'", GREY, 0.8)
    arrow((1.85, 3.6), (2.25, 3.6))
    arrow((6.85, 4.6), (7.9, 3.85))
    arrow((6.85, 3.6), (7.8, 3.6))
    arrow((8.2, 3.15), (8.2, 2.85))
    arrow((1.85, 2.4), (7.8, 2.4))
    arrow((8.6, 2.4), (9.15, 2.4))
    axes.annotate(
        "",
        (11.8, 2.8),
        (8.5, 2.7),
        arrowprops={**line, "connectionstyle": "arc3,rad=-0.4"},
    )
    arrow((10, 1.95), (10, 1.65))
    arrow((6.85, 1.2), (9.6, 1.2))
    arrow((10.4, 1.2), (11.3, 1.2))
    return figure


def normalize_with_norm() -> Figure:
    """Vectors, their directions on the unit circle, and their norms."""
    vectors = torch.tensor([[1.8, 1.2], [-0.5, 0.3], [0.9, -1.9]])
    direction, norm, _ = ops.normalize_with_norm(vectors)
    figure = Figure(figsize=(4.4, 4.2), layout="constrained")
    axes = figure.subplots()
    angles = np.linspace(0, 2 * np.pi, 200)
    axes.plot(np.cos(angles), np.sin(angles), color=GREY, lw=1, linestyle=":")
    for x, d, n in zip(vectors, direction, norm, strict=True):
        arrow = {"arrowstyle": "->", "lw": 2}
        axes.annotate("", x.tolist(), (0, 0), arrowprops={**arrow, "color": BLUE})
        axes.annotate("", d.tolist(), (0, 0), arrowprops={**arrow, "color": ORANGE, "lw": 3})
        place = torch.maximum(n + 0.25, torch.tensor(1.25)) * d
        axes.text(*place.tolist(), f"norm {n:.2f}", color=BLUE, ha="center", va="center")
    axes.set(xlim=(-2.4, 2.4), ylim=(-2.4, 2.4), aspect="equal")
    axes.set_title("blue: x, orange: its direction", fontsize=10)
    return figure


def scipy_conv2d() -> Figure:
    """An image, a filter, and the three modes."""
    image = torch.zeros(12, 12)
    image[3:9, 4:8] = 1
    kernel = torch.tensor([[1.0, 0.0, -1.0]] * 3)
    pictures = {"image": image, "filter": kernel}
    for mode in ("full", "same", "valid"):
        pictures[f"mode = {mode}"] = ops.scipy_conv2d(image, kernel, mode=mode)
    figure = Figure(figsize=(9.6, 2.4), layout="constrained")
    for axes, (title, values) in zip(figure.subplots(1, 5), pictures.items(), strict=True):
        axes.imshow(values, cmap="RdBu", vmin=-3, vmax=3)
        height, width = values.shape
        axes.set_title(f"{title}, {height} × {width}", fontsize=10)
        axes.set(xlim=(-1.5, 13.5), ylim=(13.5, -1.5), xticks=[], yticks=[])
    return figure


def rfft2_magnitude() -> Figure:
    """An image of two waves, and the magnitudes of its transform."""
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    image = torch.cos(2 * np.pi * (3 * x + 2 * y) / 32) + 0.5 * torch.cos(2 * np.pi * 9 * x / 32)
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(32, 17))
    left.imshow(image, cmap="gray")
    left.set_title("x, 32 × 32", fontsize=10)
    right.imshow(ops.rfft2_magnitude(image), cmap="magma")
    right.set_title("|rfft2(x)|, 32 × 17", fontsize=10)
    return figure


def check_gradients() -> Path:
    """The report on a gradient with the sign flipped, which draws itself."""
    import wrong_sign

    torch.manual_seed(0)
    path = HERE / "images" / "check_gradients.png"
    ops.check_gradients(wrong_sign.cube, torch.randn(2, 2)).plot(str(path))
    return path


def main() -> None:
    """Draw all pictures."""
    for draw in (
        improved_triplet_loss,
        chamfer_distance,
        ssim,
        lncc_loss,
        hausdorff_dt_loss,
        set_matching_loss,
        batch_hard_triplet_loss,
        batch_semi_hard_triplet_loss,
        info_nce_loss,
        supcon_loss,
        soft_dtw,
        monotonic_alignment_search,
        lltm,
        normalize_with_norm,
        scipy_conv2d,
        rfft2_magnitude,
    ):
        draw().savefig(HERE / "images" / f"{draw.__name__}.png", dpi=DPI)
    check_gradients()


if __name__ == "__main__":
    main()
