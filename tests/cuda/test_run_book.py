"""The run book for a machine with a GPU: its order and limits, tested with a fake Python."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

from tests.harness import first_light
from tests.harness.op_under_test import DTYPES, OpUnderTest

PRETENDS = """#!/bin/sh
echo "$*" >> "$CALLS"
case "$*" in
  *get_device_name*) echo Some-GPU ;;
  *$FAILS*) echo 'this one fails'; exit 3 ;;
  *$HANGS*) echo 'this one hangs'; sleep 100 ;;
  *$KILLED*) kill -9 $$ ;;
esac
"""

SOME_TESTS = """
import pathlib, time
def test_fails():
    assert False, "for this reason"
def test_waits():
    time.sleep(2)  # by then a test of another worker has failed
    pathlib.Path("waits").touch()
    time.sleep(100)
"""


@pytest.fixture
def run_book(root, tmp_path):
    """Run it; return its status, its summary, and the calls of Python."""

    def run(fails="@", hangs="@", killed="@", budget="450", out=None):
        out = out or tmp_path / "out"
        python, calls = tmp_path / "it's a python", tmp_path / "calls"
        python.write_text(PRETENDS)
        python.chmod(0o755)
        calls.touch()
        environment = {"CALLS": str(calls), "FAILS": fails, "HANGS": hangs, "KILLED": killed}
        environment |= {"BUDGET": budget, "OUT": str(out), "CUDA_HOME": "/none"}
        done = subprocess.run(
            [root / ".ci/gpu", python],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        summary = out / "summary.txt"
        return done, summary.read_text() if summary.is_file() else "", calls.read_text()

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


@pytest.mark.parametrize("workers", [[], ["-n", "2"]])
def test_tests_that_are_stopped_say_what_has_failed_so_far(root, tmp_path, workers):
    (program,) = re.findall(r"PYTEST='([^']*)'", (root / ".ci/gpu").read_text())
    (tmp_path / "test_some.py").write_text(SOME_TESTS)
    pytest_command = [sys.executable, "-c", program, "-q", "-p", "no:cacheprovider", *workers]
    with subprocess.Popen(
        pytest_command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as stopped:
        while not (tmp_path / "waits").exists():
            time.sleep(0.1)
        os.killpg(stopped.pid, signal.SIGTERM)  # as timeout does
        said, _ = stopped.communicate(timeout=120)  # a loaded machine took 30 seconds
    assert "FAILED test_some.py::test_fails - AssertionError: for this reason" in said


def test_what_cannot_be_built_ends_no_step(run_book):
    done, summary, _ = run_book(fails="ops build")
    assert done.returncode == 1
    assert "FAILED with 3     0 s  all CUDA ops, built" in summary
    assert all(step in summary for step in STEPS)


def test_a_step_killed_by_the_system_was_not_at_its_limit(run_book):
    _, summary, _ = run_book(killed="first_light")
    assert "KILLED            0 s  each kernel in each dtype against float64" in summary


def test_a_machine_that_does_not_answer_costs_the_budget_at_most(run_book):
    done, summary, _ = run_book(hangs="ops doctor", budget="3")
    assert done.returncode == 1
    assert not summary


def test_a_folder_that_cannot_be_written_ends_it_at_once(run_book, tmp_path):
    (tmp_path / "file").touch()
    done, _, calls = run_book(out=tmp_path / "file" / "out")
    assert done.returncode == 1
    assert f"make gpu: OUT must be a folder to write to, got {tmp_path}/file/out" in done.stderr
    assert "first_light" not in calls


@pytest.mark.parametrize("budget", ["7 min", "090", "-5", "450.0"])
def test_a_budget_that_is_no_number_ends_it_at_once(run_book, budget):
    done, _, calls = run_book(budget=budget)
    assert done.returncode == 1
    assert f"make gpu: BUDGET must be a whole number of seconds, got {budget}" in done.stderr
    assert not calls


def test_an_op_that_raises_ends_no_other(monkeypatch, capfd):
    def raises(x):
        raise ValueError("this op raises")

    def twice(x):
        return 2 * x

    launches = lambda *_: [[torch.ones(3)]]  # noqa: E731
    some = {
        name: OpUnderTest(name, call, twice, ("x",), None, (), launches=launches)
        for name, call in (("first", raises), ("second", twice))
    }
    monkeypatch.setattr(first_light, "compiled_ops", lambda: some)
    monkeypatch.setattr(sys, "argv", ["first_light", "--backend", "torch"])
    assert first_light.main() == 1
    out, err = capfd.readouterr()
    assert "WRONG first, torch.float16: an error" in out
    assert "second, torch.float16: at most 0 of the largest element off" in out
    assert f"torch: {len(DTYPES)} wrong" in out
    assert "ValueError: this op raises" in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: make gpu would go on")
def test_it_ends_early_where_there_is_no_gpu_and_says_why(root):
    done = subprocess.run(
        [root / ".ci/gpu", sys.executable], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 1
    assert "Back end cuda: does NOT work" in done.stdout
    assert done.stderr == "make gpu: no GPU run here, for the reason above.\n"
    assert "====" not in done.stdout
