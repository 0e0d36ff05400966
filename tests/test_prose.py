"""The prose of README and docs is easy to read: short sentences that name the thing.

``python -m tests.test_prose`` prints the figures.
"""

from __future__ import annotations

import math
import re

import pytest

from tests.harness.helpers import ROOT

DOCUMENTS = [
    str(path.relative_to(ROOT))
    for path in (
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
        ROOT / "benchmarks" / "README.md",
        *sorted((ROOT / "docs").rglob("*.md")),
    )
    if ".zh-" not in path.name
]
WORDS_A_SENTENCE = 18
WHATS_IN_A_THOUSAND = 3


def prose(text):
    """The words of each sentence, without code, tables, headings and addresses of links."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"<!--.*?-->|<[^>]+>", "", text, flags=re.DOTALL)
    text = re.sub(r"^[#|].*$", "\n", text, flags=re.MULTILINE)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"`+[^`]+`+", "code", text)
    # A sentence ends before a capital or code, and with its paragraph or point of a list.
    for block in re.split(r"\n\s*\n|^\s*(?:[-*]|\d+\.)\s", text, flags=re.MULTILINE):
        for sentence in re.split(r"[.!?][\"*)]*\s+(?=[\"*(]*[A-Z0-9]|code)", block):
            if words := re.findall(r"[A-Za-z][\w'’-]*", sentence):
                yield words


def measured(text):
    """How many words, how many in a sentence on average, and how many of them are "what"."""
    sentences = list(prose(text))
    words = [word.lower() for sentence in sentences for word in sentence]
    whats = sum(word in ("what", "whatever", "what's") for word in words)
    return len(words), len(words) / max(1, len(sentences)), whats


def faults(text):
    """What is too much."""
    count, length, whats = measured(text)
    if length > WORDS_A_SENTENCE:
        yield f"{length:.1f} words a sentence, more than {WORDS_A_SENTENCE}"
    allowed = math.ceil(WHATS_IN_A_THOUSAND * count / 1000)
    if whats > allowed:
        yield f'{whats} times "what" in {count} words, more than {allowed}'


@pytest.mark.parametrize("name", DOCUMENTS)
def test_prose_is_plain(name):
    assert not list(faults((ROOT / name).read_text()))


def test_what_is_rare_in_all_documents_together():
    texts = "\n\n".join((ROOT / name).read_text() for name in DOCUMENTS)
    count, _, whats = measured(texts)
    assert count > 3000
    assert 1000 * whats / count <= WHATS_IN_A_THOUSAND


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (f"{'word ' * 19}end.", "20.0 words a sentence"),
        ("It says what is what. It is short.", '2 times "what" in 8 words, more than 1'),
        ("| what | what |\n|---|---|\n\n```sh\nwhat what\n```\n\nIt is `what`, what.", None),
        (f"{'word ' * 17}end. Code `a. B` ends no sentence.\n- A point does.\n- It does.", None),
    ],
)
def test_the_measure_finds_it(text, found):
    problems = list(faults(text))
    assert problems == [] if found is None else any(found in problem for problem in problems)


if __name__ == "__main__":
    for name in DOCUMENTS:
        count, length, whats = measured((ROOT / name).read_text())
        rate = 1000 * whats / max(1, count)
        print(f"{name:36} {count:5} words, {length:4.1f} a sentence, {rate:4.1f} what in 1,000")
