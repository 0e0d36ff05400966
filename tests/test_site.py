"""The site: its examples print the shown output, its formulas are drawn, its checks find faults.

``make docs`` builds it and runs those checks. Nothing here needs Sphinx.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import io
import os
import re
import subprocess

import pytest

import ops
from tests.harness.helpers import ROOT

DOCS = ROOT / "docs"
PAGES = [*sorted((DOCS / "ops").glob("*.md")), DOCS / "check-gradients.md"]


def extension(name):
    """Import a module of the Sphinx extension without the package, which imports Sphinx."""
    spec = importlib.util.spec_from_file_location(name, DOCS / "_extension" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check, docstrings, formulas, generated = map(
    extension, ("check", "docstrings", "formulas", "generated")
)

# ---- pages ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_an_example_prints_what_is_shown(page):
    code, shown = re.search(
        r"```python\n(.*?)```\n\n```text\n(.*?)```", page.read_text(), re.S
    ).groups()
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    assert printed.getvalue() == shown
    if page.parent.name == "ops":
        assert len([line for line in code.splitlines() if line]) <= 6


@pytest.mark.parametrize("op", generated.op_names())
def test_an_op_has_its_page(op):
    text = (DOCS / "ops" / f"{op}.md").read_text()
    assert text.startswith(f"# {op}\n")
    for part in ("## Example", "## Reference", f"<!-- generated: reference {op} -->", "## Speed"):
        assert f"\n{part}\n" in text, part


def test_every_page_is_of_an_op():
    assert {path.stem for path in (DOCS / "ops").glob("*.md")} == set(generated.op_names())


def test_every_picture_is_drawn_by_code_and_shown():
    text = "".join(path.read_text() for path in [ROOT / "README.md", *DOCS.rglob("*.md")])
    drawn = (DOCS / "pictures.py").read_text()
    for path in (DOCS / "images").iterdir():
        assert f"images/{path.name}" in text, path
        by_another = path.stem in ("demo", "speed")  # jitops demo, benchmarks.plot
        assert by_another or f"def {path.stem}(" in drawn, path


# ---- formulas ------------------------------------------------------------------------------------


def formulas_of(text):
    text = inspect.cleandoc(text)
    blocks = re.findall(r"^([ ]*)\.\. math::(.*\n(?:\1[ ]+.*\n|\n)*)", f"{text}\n", re.MULTILINE)
    return [block for _, block in blocks] + re.findall(r":math:`([^`]+)`", text)


def test_every_formula_of_a_docstring_can_be_drawn():
    """Unknown LaTeX raises an error."""
    with_formula = set()
    for name in ops.__all__:
        for formula in formulas_of(getattr(ops, name).__doc__ or ""):
            assert all("<path" in formulas.svg(line) for line in formulas.lines(formula)), formula
            with_formula.add(name)
    assert with_formula >= set(generated.op_names()) - {"from_numpy"}
    with pytest.raises(ValueError, match="Unknown symbol"):
        formulas.svg(r"\nosuch")
    with pytest.raises(ValueError, match="no LaTeX for ᶻ"):
        formulas.latex_of("xᶻ")
    with pytest.raises(ValueError, match=r"no LaTeX for \^\("):
        formulas.latex_of("x^(a + b)")


@pytest.mark.parametrize("op", generated.op_names())
def test_an_op_shows_its_formula(op):
    """The formula is rendered: in ``.. math::`` of the docstring, or on its page."""
    page = (DOCS / "ops" / f"{op}.md").read_text()
    docstring = getattr(ops, op).__doc__
    assert op == "from_numpy" or "```{math}" in page or ".. math::" in docstring


@pytest.mark.parametrize(
    ("plain", "latex"),
    [
        ("d⁺ᵢ = ‖aᵢ − pᵢ‖²", "d^{+}_{i} = ‖a_{i} − p_{i}‖^{2}"),
        ("max(d, t₁) + β max(d, t₂)", r"\mathrm{max}(d, t_{1}) + β\,\mathrm{max}(d, t_{2})"),
        ("x Wᵀ + b", "x W^{T} + b"),
        ("Σᵢ min_j |xᵢ − y_j|", r"\sum_{i}\,\mathrm{min}_j\,|x_{i} − y_j|"),
        ("ℓ = Σ_b Σᵢ xᵢ", r"ℓ = \sum_b\;\sum_{i} x_{i}"),
        ("σ = argmin Σᵢ xᵢ", r"σ = \mathrm{argmin}\,\sum_{i} x_{i}"),
        ("s = mean(u)^{w_S} ∏ⱼ vⱼ", r"s = \mathrm{mean}(u)^{w_S}\;\prod_{j} v_{j}"),
        ("Xₖₗ = exp(−i)", r"X_{kl} = \mathrm{exp}(−i)"),
    ],
)
def test_plain_text_becomes_latex(plain, latex):
    assert formulas.latex_of(plain) == latex
    assert "<path" in formulas.svg(formulas.lines(plain)[0])


def test_a_line_of_plain_text_stays_a_line():
    assert formulas.lines("h = x\n\n  c = y") == ["h = x", "c = y"]


def test_a_wide_formula_takes_several_lines():
    assert len(formulas.lines(r"a = b, \qquad c = d")) == 1
    assert len(formulas.lines(r"\qquad".join(["a + b + c + d + e + f = g"] * 4))) == 4


# ---- docstrings and generated text ---------------------------------------------------------------


def test_returns_is_prose():
    text = "Does.\n\nReturns:\n    A scalar; with ``x``: more.\n    Of it.\n\nRaises:\n    E: no.\n"
    assert docstrings.returns_as_a_field(text) == (
        "Does.\n\n:returns: A scalar; with ``x``: more.\n    Of it.\n\nRaises:\n    E: no.\n"
    )


def test_links_lead_to_pages():
    page = DOCS / "ops" / "x.md"
    text = "[a](../../benchmarks/README.md) [b](../loader.md#flags) [c](https://a.b) [d](../../ops)"
    assert generated.complete(text, page) == (
        "[a](../speed.md) [b](../loader.md#flags) [c](https://a.b) d",
        [],
    )
    text, files = generated.complete("<!-- generated: file README.md -->", DOCS / "index.md")
    assert files == [ROOT / "README.md"]
    assert "](loader.md)" in text
    assert '<img src="images/speed.svg"' in text


def test_an_unknown_reference_is_an_error():
    with pytest.raises(ValueError, match="no public name of ops comes from a module nothing"):
        generated.complete("<!-- generated: reference nothing -->", DOCS / "index.md")


def test_every_public_name_is_on_a_page():
    text = "".join(
        generated.complete(path.read_text(), path)[0] for path in sorted(DOCS.rglob("*.md"))
    )
    for name in generated.public_names():
        assert re.search(rf"^\.\. auto\w+:: {re.escape(name)}$", text, re.MULTILINE), name
    assert {name.removeprefix("ops.") for name in generated.public_names()} == {
        name for name in ops.__all__ if name != "jit"
    }


# ---- the checks of a built site ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("the loss \\frac{1}{2} x", "the formula '\\\\frac' is not rendered"),
        ("see :func:`ops.linear`", "the formula ':func:`' is not rendered"),
        ("$$ x $$", "the formula '$$' is not rendered"),
        ('<img src="no.png">', "the picture no.png does not exist"),
        ('<a href="no.html">x</a>', "the link no.html leads nowhere"),
        ('<a href="#no">x</a>', "the anchor of #no does not exist"),
        ('<a href="b.html#no">x</a>', "the anchor of b.html#no does not exist"),
    ],
)
def test_a_fault_is_found(tmp_path, body, problem):
    (tmp_path / "a.html").write_text(f"<p>{body}</p>")
    (tmp_path / "b.html").write_text('<p id="yes">x</p>')
    assert f"a.html: {problem}" in check.problems(tmp_path)


def test_a_good_page_passes(tmp_path):
    (tmp_path / "picture.png").write_bytes(b"")
    (tmp_path / "a.html").write_text(
        '<p id="x"><code>\\frac</code> <img src="picture.png"> <a href="#x">x</a> '
        '<a href="a.html#x">x</a> <a href="https://a.b/">x</a></p>'
    )
    assert check.problems(tmp_path) == []


# ---- targets -------------------------------------------------------------------------------------


def planned(target):
    """The commands that make would run for a target."""
    done = subprocess.run(
        ["make", "-n", "-B", "--no-print-directory", target],  # -B: whatever is installed already
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if not name.startswith("MAKE")},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_make_docs_takes_warnings_for_errors_and_ci_calls_it():
    assert re.search(r'pip install .* -e "\.\[docs\]"', planned("docs"))
    assert re.search(r"-m sphinx --fail-on-warning .* docs build/site$", planned("docs"), re.M)
    assert "\nmake docs\n" in (ROOT / ".ci" / "run").read_text()


def test_make_bench_draws_the_chart():
    bench, plot = planned("bench").splitlines()[-2:]
    assert "-m benchmarks" in bench
    assert plot.endswith("-m benchmarks.plot")
