"""The README says what is so: its example prints what it shows, its commands exist."""

from __future__ import annotations

import re

import pytest

from tests.harness.helpers import ROOT, run

README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.cpp
def test_the_example_prints_what_is_shown(tmp_path):
    shown = blocks("text")[0].splitlines()
    out, err = run(blocks("python")[0], JITOPS_CACHE_DIR=tmp_path, JITOPS_PROGRESS="1")
    assert out.splitlines() == shown[1:]
    assert re.sub(r"[\d.]+ s", "s", err.strip()) == re.sub(r"[\d.]+ s", "s", shown[0])


def test_its_commands_are_targets():
    makefile = (ROOT / "Makefile").read_text()
    commands = re.findall(r"^make (\w+)", "\n".join(blocks("sh")), re.MULTILINE)
    assert commands == ["demo", "test"]
    for command in (*commands, *re.findall(r"`make (\w+)`", README)):
        assert re.search(rf"^{command}:", makefile, re.MULTILINE), command


def test_its_links_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
