"""The prose of README, docs and public docstrings is easy to read: short sentences.

``python -m tests.test_prose`` prints the figures.
"""

from __future__ import annotations

import inspect
import math
import re

import pytest

import ops
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


def public_objects():
    """Every public name of ``ops`` and of ``ops.jit``, with its object."""
    for name in ops.__all__:
        yield name, getattr(ops, name)
    for name in ops.jit.__all__:
        yield f"jit.{name}", getattr(ops.jit, name)


def docstrings_of(value):
    """The docstring of an object, and those of the public methods of a class."""
    yield inspect.getdoc(value) or ""
    if inspect.isclass(value):
        for name, member in vars(value).items():
            is_public = not name.startswith("_") or name == "__call__"
            if is_public and (callable(member) or isinstance(member, property)):
                yield inspect.getdoc(member) or ""


DOCSTRINGS = {
    name: text
    for name, value in public_objects()
    if (text := "\n\n".join(filter(None, docstrings_of(value))))
}


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


def markdown(docstring):
    """A docstring with arguments as points of a list, without formulas, examples and headings."""
    text = re.sub(r"^( *)\.\. math::.*\n(?:\1 +.*\n|\n)*", "\n\n", docstring + "\n", flags=re.M)
    text = re.sub(r"^ *>>> .*\n(?: *\S.*\n)*", "", text, flags=re.M)
    text = re.sub(r"^( *).*::\n\n(?:\1 +.*\n|\n)+", "\n\n", text, flags=re.M)
    text = re.sub(r"^[A-Z]\w+:$", "", text, flags=re.M)
    text = re.sub(r"^ {4}(?:\*{0,2}\w+(?:, )?)+: ", "\n- ", text, flags=re.M)
    return re.sub(r":[a-z:]+:(?=`)", "", text)


def measured(text):
    """How many words, how many in a sentence on average, and how many of them are "what"."""
    sentences = list(prose(text))
    words = [word.lower() for sentence in sentences for word in sentence]
    whats = sum(word in ("what", "whatever", "what's") for word in words)
    return len(words), len(words) / max(1, len(sentences)), whats


def faults(text):
    """The limits that a text exceeds."""
    count, length, whats = measured(text)
    if length > WORDS_A_SENTENCE:
        yield f"{length:.1f} words a sentence, more than {WORDS_A_SENTENCE}"
    allowed = math.ceil(WHATS_IN_A_THOUSAND * count / 1000)
    if whats > allowed:
        yield f'{whats} times "what" in {count} words, more than {allowed}'


@pytest.mark.parametrize("name", DOCUMENTS)
def test_prose_is_plain(name):
    assert not list(faults((ROOT / name).read_text()))


@pytest.mark.parametrize("name", list(DOCSTRINGS))
def test_docstrings_are_plain(name):
    assert not list(faults(markdown(DOCSTRINGS[name])))


def texts():
    """All documents together, and all public docstrings together."""
    yield "\n\n".join((ROOT / name).read_text() for name in DOCUMENTS)
    yield "\n\n".join(map(markdown, dict.fromkeys(DOCSTRINGS.values())))


def test_what_is_rare_in_all_texts_together():
    for text in texts():
        count, _, whats = measured(text)
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


def test_a_docstring_becomes_markdown():
    text = markdown(
        "Does ``x``, as :func:`f`.\n\n.. math::\n\n    y = what\n\nArgs:\n    a, b: first\n"
        "        line.\n    **c: second.\n\nExample:\n    >>> what\n    what\n"
    )
    assert [" ".join(words) for words in prose(text)] == [
        "Does code as code",
        "first line",
        "second",
    ]


if __name__ == "__main__":
    every = {name: (ROOT / name).read_text() for name in DOCUMENTS}
    every |= {f"ops.{name}": markdown(text) for name, text in DOCSTRINGS.items()}
    every["all public docstrings"] = list(texts())[1]
    for name, text in every.items():
        count, length, whats = measured(text)
        rate = 1000 * whats / max(1, count)
        print(f"{name:36} {count:5} words, {length:4.1f} a sentence, {rate:4.1f} what in 1,000")
