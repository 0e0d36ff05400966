"""The run book for a machine with a GPU: its order and limits, tested with a fake Python."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

PRETENDS = """#!/bin/sh
echo "$*" >> "$CALLS"
case "$*" in
  *get_device_name*) echo Some-GPU ;;
  *$FAILS*) echo 'this one fails'; exit 3 ;;
  *$HANGS*) echo 'this one hangs'; sleep 100 ;;
esac
"""


@pytest.fixture
def run_book(root, tmp_path):
    """Run it; return its status, its summary, and the calls of Python."""

    def run(fails="@", hangs="@", budget="450"):
        python, calls = tmp_path / "python", tmp_path / "calls"
        python.write_text(PRETENDS)
        python.chmod(0o755)
        environment = {"CALLS": str(calls), "FAILS": fails, "HANGS": hangs, "BUDGET": budget}
        done = subprocess.run(
            [root / ".ci/gpu", python],
            env={**os.environ, **environment, "OUT": str(tmp_path / "out"), "CUDA_HOME": "/none"},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        return done, (tmp_path / "out/summary.txt").read_text(), calls.read_text()

    return run


STEPS = (
    "the machine",
    "all CUDA ops, built",
    "each kernel in each dtype against float64",
    "the kernels alone",
    "streams, graphs",
    "the battery on the GPU",
    "what users see",
    "what takes torch.compile long",
)


def test_all_steps_run_in_order(run_book):
    done, summary, calls = run_book()
    places = [summary.index(step) for step in STEPS]
    assert places == sorted(places)
    assert summary.count("\nok") == len(STEPS) - 1
    assert "tests/layers/test_lltm.py" in calls
    assert summary in done.stdout  # the summary is also printed last


def test_a_step_that_fails_ends_no_other(run_book, tmp_path):
    done, summary, _ = run_book(fails="first_light")
    assert done.returncode == 1
    assert "FAILED with 3     0 s  each kernel in each dtype against float64" in summary
    assert all(step in summary for step in STEPS)
    assert "this one fails" in (tmp_path / "out/first_light.log").read_text()


def test_a_step_that_hangs_is_stopped_and_the_budget_holds(run_book, tmp_path):
    done, summary, _ = run_book(hangs="kernels", budget="9")
    assert done.returncode == 1
    assert "STOPPED at its limit" in summary
    assert "SKIPPED        what users see, against eager and torch.compile: the budget" in summary
    assert "this one hangs" in (tmp_path / "out/kernels.log").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: make gpu would go on")
def test_it_ends_early_where_there_is_no_gpu_and_says_why(root):
    done = subprocess.run(
        [root / ".ci/gpu", sys.executable], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 1
    assert "Back end cuda: does NOT work" in done.stdout
    assert done.stderr == "make gpu: no GPU run here, for the reason above.\n"
    assert "====" not in done.stdout
