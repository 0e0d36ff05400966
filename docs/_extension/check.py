"""Checks of a built site: every link and picture leads somewhere, no formula is left as text."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

# A LaTeX command, a role of reStructuredText, or dollars around a formula.
RAW = re.compile(r"\\[A-Za-z]{2,}|:[a-z]+:`|\$\$|\\\(")
_VERBATIM = ("code", "pre", "script", "style")


class Page(HTMLParser):
    """The links, pictures, anchors and raw formulas of one page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.pictures: list[str] = []
        self.anchors: set[str] = set()
        self.raw: list[str] = []
        self._verbatim = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect addresses and anchors."""
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.targets.append(values["href"])
        if tag == "img":
            self.pictures.append(values.get("src", ""))
        self._verbatim += tag in _VERBATIM

    def handle_endtag(self, tag: str) -> None:
        """Leave code."""
        self._verbatim -= tag in _VERBATIM

    def handle_data(self, data: str) -> None:
        """Look for formulas outside code."""
        if not self._verbatim:
            self.raw += RAW.findall(data)


def problems(folder: Path) -> list[str]:
    """Everything that is wrong with the pages below a folder."""
    pages = {path: Page(path.read_text()) for path in sorted(folder.rglob("*.html"))}
    return [
        f"{path.relative_to(folder)}: {problem}"
        for path, page in pages.items()
        for problem in _problems_of(path, page, pages)
    ]


def _problems_of(path: Path, page: Page, pages: dict[Path, Page]) -> list[str]:
    found = [f"the formula {text!r} is not rendered" for text in page.raw]
    for address in page.pictures:
        if not re.match(r"[a-z]+:", address) and not (path.parent / unquote(address)).is_file():
            found.append(f"the picture {address} does not exist")
    for address in page.targets:
        if re.match(r"[a-z]+:", address):
            continue
        file, _, anchor = unquote(address).partition("#")
        target = (path.parent / file).resolve() if file else path
        if not target.is_file():
            found.append(f"the link {address} leads nowhere")
        elif anchor and target in pages and anchor not in pages[target].anchors:
            found.append(f"the anchor of {address} does not exist")
    return found
