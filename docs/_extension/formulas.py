r"""Formulas as inline SVG, drawn by matplotlib: no LaTeX, no JavaScript and no network.

A formula is LaTeX, or plain text as a terminal shows it: ``d⁺ᵢ = ‖aᵢ − pᵢ‖²``. Docstrings hold
plain text in ``.. math::``, because ``help()`` shows it as it stands.
"""

from __future__ import annotations

import functools
import html
import re
from typing import Any

_WIDEST = 38.0  # em that a line of the page holds

# LaTeX that mathtext spells in another way.
_SPELLED = {
    r"\lVert": r"\Vert ",
    r"\rVert": r"\Vert ",
    r"\lvert": r"\vert ",
    r"\rvert": r"\vert ",
    r"\le ": r"\leq ",
    r"\ge ": r"\geq ",
    r"\ne ": r"\neq ",
    r"\max": r"\,\max",
    "'": r"\prime ",  # raised already in this font
}
_RAISED = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ᵀᵅᵞ", "0123456789+-T\u03b1\u03b3", strict=True))
_LOWERED = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋ᵢⱼₖₗₙₘₚₜₓ", "0123456789+-ijklnmptx", strict=True))


def latex_of(plain: str) -> str:
    """A formula in plain text, as LaTeX: raised and lowered letters, names of functions."""

    def script(sign: str, letters: dict[str, str], text: str) -> str:
        pattern = f"[{''.join(letters)}]+"
        return re.sub(
            pattern, lambda found: f"{sign}{{{''.join(letters[c] for c in found[0])}}}", text
        )

    text = re.sub(r"( ?)([A-Za-z]{2,}[A-Za-z0-9_]*)( ?)", _upright, plain)
    text = re.sub(" ([Σ∏])", r"\\;\1", text).replace(" |", r"\,|")
    text = text.replace("Σ", r"\sum").replace("∏", r"\prod")
    text = re.sub(r"([=+−·])\\[,;]", r"\1 ", text)
    text = script("_", _LOWERED, script("^", _RAISED, text))
    if unknown := re.findall(r"[\u1d2c-\u1d6a\u1d9b-\u1dbf\u2070-\u209f]|[_^]\(", text):
        raise ValueError(f"no LaTeX for {', '.join(unknown)} in the formula {plain!r}")
    return text


def _upright(found: re.Match[str]) -> str:
    before, name, after = (r"\," if part == " " else part for part in found.groups())
    word, _, letter = name.rpartition("_")
    if word and len(letter) == 1:  # min_j
        return rf"{before}\mathrm{{{word}}}_{letter}{after}"
    return rf"{before}\mathrm{{{name.replace('_', chr(92) + '_')}}}{after}"


def lines(formula: str) -> list[str]:
    """The formula in mathtext's LaTeX.

    A line of plain text stays a line. LaTeX that is too wide for a line has one for each part.
    """
    if "\\" not in formula:
        return [latex_of(" ".join(line.split())) for line in formula.splitlines() if line.strip()]
    formula = " ".join(formula.split())
    for spelled, instead in _SPELLED.items():
        formula = formula.replace(spelled, instead)
    parts = [part.strip() for part in re.split(r"\\q?quad", formula)]
    whole = r" \qquad ".join(parts)
    return [whole] if len(parts) == 1 or _drawn(whole)[0] <= _WIDEST else parts


@functools.cache
def _drawn(formula: str) -> tuple[float, float, float, str]:
    """Width, height and depth in em, and the path."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextToPath

    text = f"${formula}$"
    drawer = TextToPath()
    font = FontProperties(family="serif", math_fontfamily="stix", size=drawer.FONT_SCALE)
    width, height, depth = drawer.get_text_width_height_descent(text, font, ismath=True)
    vertices, codes = drawer.get_text_path(font, text, ismath=True)
    letters = {1: ("M", 1), 2: ("L", 1), 3: ("Q", 2), 4: ("C", 3), 79: ("Z", 1)}
    words: list[str] = []
    place = 0
    while place < len(codes):
        letter, count = letters[int(codes[place])]
        words.append(letter)
        if letter != "Z":
            points = vertices[place : place + count]
            words.append(" ".join(f"{x:.1f} {-y:.1f}" for x, y in points))
        place += count
    em = drawer.FONT_SCALE
    return width / em, height / em, depth / em, "".join(words)


def svg(formula: str) -> str:
    """One line of a formula, aligned with the text around it."""
    width, height, depth, path = _drawn(formula)
    margin = 0.05
    height, depth = height + 2 * margin, depth + margin
    box = f"0 {-100 * (height - depth):.1f} {100 * width:.1f} {100 * height:.1f}"
    return (
        f'<svg class="formula" role="img" aria-label="{html.escape(formula)}" viewBox="{box}" '
        f'style="width:{width:.3f}em;height:{height:.3f}em;vertical-align:{-depth:.3f}em">'
        f'<path d="{path}"/></svg>'
    )


def visit_inline(writer: Any, node: Any) -> None:
    """A formula within a sentence."""
    from docutils.nodes import SkipNode

    formula = " ".join(node.astext().split())
    writer.body.append("".join(map(svg, lines(formula))))
    raise SkipNode


def visit_display(writer: Any, node: Any) -> None:
    """A formula that stands by itself."""
    from docutils.nodes import SkipNode

    formula = node.astext().replace(r"\frac", r"\dfrac")
    rows = "".join(f"<div>{svg(line)}</div>" for line in lines(formula))
    writer.body.append(f'<div class="formulas">{rows}</div>\n')
    raise SkipNode
