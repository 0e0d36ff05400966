"""The prose of README and docs is easy to read: short sentences that name the thing."""

from __future__ import annotations

import re

from tests.harness.helpers import ROOT

DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    ROOT / "benchmarks" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
ENGLISH = [path for path in DOCUMENTS if ".zh-" not in path.name]
WORDS_A_SENTENCE = 18
WHATS_IN_A_THOUSAND = 3


def prose(text):
    """The sentences of a Markdown text, without code, tables, headings and addresses of links."""
    text = re.sub(r"^(```|:::|---$).*?^\1.*?$", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"<!--.*?-->|<[^>]+>", "", text, flags=re.DOTALL)
    text = re.sub(r"^(#|\||\s*\[\w+\]:).*$", "\n", text, flags=re.MULTILINE)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"`+[^`]+`+", "code", text)
    blocks = re.split(r"\n\s*\n|^\s*(?:[-*]|\d+\.)\s", text, flags=re.MULTILINE)
    # A sentence ends before a capital; "e.g. a" and "0.5" end none. So does a block, and a colon
    # that introduces a list or code.
    for block in blocks:
        for sentence in re.split(r"[.!?][\"*)]*\s+(?=[\"*(]*[A-Z0-9]|code)", block):
            if words := re.findall(r"[A-Za-z][\w'’-]*", sentence):
                yield words


def measured(text):
    """Words, words a sentence, and how often "what" in a thousand words."""
    sentences = list(prose(text))
    words = [word.lower() for sentence in sentences for word in sentence]
    whats = sum(word in ("what", "whatever", "what's") for word in words)
    return len(words), len(words) / len(sentences), 1000 * whats / len(words)


if __name__ == "__main__":
    for document in ENGLISH:
        count, length, whats = measured(document.read_text())
        name = str(document.relative_to(ROOT))
        print(f"{name:28} {count:5} words, {length:4.1f} a sentence, {whats:4.1f} what in 1,000")
