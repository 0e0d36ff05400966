"""``python -m benchmarks.plot``: draw the bar chart of the README from the results of a bench.

The published results make ``docs/images/speed.svg``. The results of the last ``make bench`` make
``speed.svg`` beside them. The SVG is written as text, so the same figures give the same bytes.
"""

from __future__ import annotations

import html
import json
from pathlib import Path

HERE = Path(__file__).resolve().parent
BENCH = "improved_triplet_loss.json"
PUBLISHED = HERE / "results" / "2026-11-23"
LATEST = HERE / "results" / "latest"
CHART = HERE.parent / "docs" / "images" / "speed.svg"

# Contender, label, colour.
CONTENDERS = (
    ("eager", "eager", "#9aa0a6"),
    ("compile", "torch.compile", "#6f9fd8"),
    ("cpp", "jitops, compiled C++", "#d9480f"),
)
WIDTH, HEIGHT = 880, 416
LEFT, RIGHT, TOP, BOTTOM = 50, 860, 112, 328  # the area with the bars
BAR, GAP = 52, 4


def times_as_fast(figures: list[dict], dtype: str = "float32") -> list[tuple[str, dict]]:
    """For each shape, the speed of each contender as a multiple of that of eager."""
    return [
        (
            "{} × {}".format(*row["shape"]),
            {name: row["us"]["eager"] / row["us"][name] for name, _, _ in CONTENDERS},
        )
        for row in figures
        if row["dtype"] == dtype
    ]


def chart(folder: Path) -> str:
    """The SVG of the CPU figures in a folder of results."""
    groups = times_as_fast(speeds(folder))
    cpu = json.loads((folder / "machine.json").read_text())["cpu"]
    highest = max(max(multiples.values()) for _, multiples in groups)

    def height(speed: float) -> float:
        return (BOTTOM - TOP) * speed / highest

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="22" fill="#24292f">',
        "<title>Speed of the improved triplet loss as a multiple of eager tensor code</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#ffffff"/>',
        _text(WIDTH / 2, 34, "Improved triplet loss: times as fast as eager", weight="bold"),
    ]
    for (_, label, colour), x in zip(CONTENDERS, (180, 300, 490), strict=True):
        parts.append(f'<rect x="{x}" y="55" width="20" height="20" fill="{colour}"/>')
        parts.append(_text(x + 28, 72, label, anchor="start"))
    step = (RIGHT - LEFT) / len(groups)
    for number, (shape, multiples) in enumerate(groups):
        middle = LEFT + step * (number + 0.5)
        x = middle - (3 * BAR + 2 * GAP) / 2
        for name, _, colour in CONTENDERS:
            tall = height(multiples[name])
            parts.append(
                f'<rect x="{x:.1f}" y="{BOTTOM - tall:.1f}" width="{BAR}" height="{tall:.1f}" '
                f'fill="{colour}"/>'
            )
            weight = "bold" if name == CONTENDERS[-1][0] else "normal"
            parts.append(
                _text(x + BAR / 2, BOTTOM - tall - 8, f"{multiples[name]:.1f}", weight=weight)
            )
            x += BAR + GAP
        parts.append(_text(middle, BOTTOM + 28, shape))
    parts.append(
        f'<line x1="{LEFT}" y1="{BOTTOM}" x2="{RIGHT}" y2="{BOTTOM}" stroke="#24292f" '
        'stroke-width="2"/>'
    )
    parts.append(_text(WIDTH / 2, HEIGHT - 30, "rows × columns, float32, forward + backward"))
    parts.append(_text(WIDTH / 2, HEIGHT - 8, cpu, size=16))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _text(
    x: float, y: float, text: str, anchor: str = "middle", weight: str = "normal", size: int = 22
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}" '
        f'font-size="{size}">{html.escape(text)}</text>'
    )


def speeds(folder: Path) -> list[dict]:
    """The CPU figures in a folder of results; none if only a GPU was measured."""
    results = json.loads((folder / BENCH).read_text())
    return results["cpp"]["speed"] if "cpp" in results else []


def main() -> None:
    """Draw the published figures, and the latest if there are any."""
    CHART.parent.mkdir(parents=True, exist_ok=True)
    CHART.write_text(chart(PUBLISHED))
    print(CHART)
    if (LATEST / BENCH).is_file() and speeds(LATEST):
        (LATEST / CHART.name).write_text(chart(LATEST))
        print(LATEST / CHART.name)


if __name__ == "__main__":
    main()
