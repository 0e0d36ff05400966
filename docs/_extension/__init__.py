"""The Sphinx extension of this site: formulas, generated text, checks of the built pages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sphinx.util import logging

from . import check, docstrings, formulas, generated

_log = logging.getLogger(__name__)


def setup(app: Any) -> dict[str, bool]:
    """Register the renderer of formulas, and what happens to texts and built pages."""
    app.add_html_math_renderer(
        "mathtext", (formulas.visit_inline, None), (formulas.visit_display, None)
    )
    app.connect("source-read", _read)
    app.connect("autodoc-process-docstring", docstrings.prepare, priority=400)
    app.connect("build-finished", _finished)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _read(app: Any, docname: str, content: list[str]) -> None:
    path = Path(app.env.doc2path(docname)).resolve()
    content[0], files = generated.complete(content[0], path)
    for file in files:
        app.env.note_dependency(str(file), docname=docname)


def _finished(app: Any, exception: Exception | None) -> None:
    if exception is None and app.builder.format == "html":
        documented = set(app.env.domains["py"].objects)
        problems = check.problems(Path(app.outdir))
        problems += [
            f"{name} is on no page" for name in generated.public_names() if name not in documented
        ]
        for problem in problems:
            _log.warning(problem)
