"""The README is true: its example, its figures, its commands, its links."""

from __future__ import annotations

import argparse
import re

import pytest

from benchmarks import plot
from ops._cli import main as cli
from tests.harness.forks import run
from tests.harness.helpers import ROOT

README = (ROOT / "README.md").read_text()
FIGURES = (ROOT / "benchmarks" / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.cpp
def test_the_example_prints_what_is_shown(tmp_path):
    shown = blocks("text")[0].splitlines()
    out, err = run(blocks("python")[0], JITOPS_CACHE_DIR=tmp_path, JITOPS_PROGRESS="1")
    assert out.splitlines() == shown[2:]
    assert re.sub(r"[\d.]+ s", "s", err).splitlines() == [
        re.sub(r"[\d.]+ s", "s", line) for line in shown[:2]
    ]


def test_its_commands_are_targets():
    makefile = (ROOT / "Makefile").read_text()
    commands = re.findall(r"^make (\w+)", "\n".join(blocks("sh")), re.MULTILINE)
    assert commands == ["demo", "test"]
    for command in (*commands, *re.findall(r"`make (\w+)`", README)):
        assert re.search(rf"^{command}:", makefile, re.MULTILINE), command


def test_the_checker_comes_right_after_the_first_loss():
    headings = re.findall("^## (.+)", README, re.MULTILINE)
    assert headings[headings.index("Use") + 1] == "Check gradients"


def test_it_lists_every_subcommand():
    (subcommands,) = (
        set(action.choices)
        for action in cli._parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    listed = re.findall(r"^jitops (\w+)", "\n".join(blocks("sh")), re.MULTILINE)
    assert sorted(listed) == sorted(subcommands)


def test_its_links_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)|src=\"([^\"]+)\"", README):
        assert (ROOT / "".join(target)).exists(), target


# ---- figures -------------------------------------------------------------------------------------


def test_the_chart_is_made_of_the_published_figures():
    assert plot.chart(plot.PUBLISHED) == plot.CHART.read_text(), "python -m benchmarks.plot"


def test_the_chart_shows_the_ratios(tmp_path):
    """Other figures give another chart."""
    for name in (plot.BENCH, "machine.json"):
        (tmp_path / name).write_text((plot.PUBLISHED / name).read_text())
    bench = tmp_path / plot.BENCH
    assert f"{plot.speeds(tmp_path)[0]['us']['cpp']}" == "39.0"
    bench.write_text(bench.read_text().replace('"cpp": 39.0', '"cpp": 11.4'))
    assert ">10.0<" in plot.chart(tmp_path)
    assert ">10.0<" not in plot.chart(plot.PUBLISHED)


def test_the_published_figures_are_those_of_the_tables():
    for row in plot.speeds(plot.PUBLISHED):
        us = row["us"]
        ratios = [f"**{us[other] / us['cpp']:.2f}x**" for other in ("eager", "compile")]
        # Ratios of rounded microseconds may differ in their last digit.
        cells = [f"({row['shape'][0]}, {row['shape'][1]})", row["dtype"]]
        cells += [f"{us[name]:.0f}" for name in ("eager", "compile", "torch", "cpp")]
        line = next(line for line in FIGURES.splitlines() if _cells(line)[:6] == cells)
        for shown, exact in zip(_cells(line)[6:], ratios, strict=True):
            assert abs(_number(shown) / _number(exact) - 1) < 0.02


def test_its_ratios_are_those_of_the_figures():
    rows = plot.speeds(plot.PUBLISHED)
    table = [_cells(line) for line in README.splitlines() if line.startswith("| improved triplet")]
    for (_, _, shown), other in zip(table, ("eager", "compile"), strict=True):
        ratios = [row["us"][other] / row["us"]["cpp"] for row in rows]
        assert shown == f"{min(ratios):.1f} to {max(ratios):.1f}"
    (lltm,) = (_cells(line)[2] for line in README.splitlines() if line.startswith("| LLTM"))
    steps = [_cells(line) for line in FIGURES.splitlines() if re.match(r"\|.*64 steps \|", line)]
    fastest = max(_number(cells[-1]) for cells in steps)
    (slowest,) = re.findall(r"64 steps gave ([\d.]+) forward", FIGURES)
    assert lltm == f"{slowest} to {fastest:.1f}"
    builds = [_cells(line) for line in README.splitlines() if line.startswith("| cold build")]
    lowest, highest = builds[0][2].split(" to ")
    assert f"gave {lowest} " in FIGURES
    assert f"and {highest}." in FIGURES


def _cells(line):
    return [cell.strip() for cell in line.strip("|\n").split("|")]


def _number(cell):
    return float(cell.strip("*x"))
