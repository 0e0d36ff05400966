"""What tests share: a call of an op, and processes with an environment of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import torch

import ops

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGE = Path(ops.__file__).resolve().parent.parent  # the same, unless a wheel is under test

# A first use of an op; prints the backward node, which tells the back end.
LOSS = """
    import sys, warnings, torch, ops
    x = [torch.ones(2, 3, requires_grad=True) for _ in range(3)]
    loss = ops.improved_triplet_loss(*x, -1.0, 0.01, 0.002)
    loss.backward()
    print(type(loss.grad_fn).__name__)
"""
COMPILED = "ImprovedTripletLossFunctionBackward"
PURE_TORCH = "ImprovedTripletLossTorchFunctionBackward"


def triplet():
    """Three small leaves for the triplet losses."""
    return [torch.randn(3, 4, requires_grad=True) for _ in range(3)]


def environment(**changes):
    """This environment with changes; ``None`` removes."""
    env = {**os.environ, "PYTHONPATH": str(PACKAGE), **changes}
    return {name: str(value) for name, value in env.items() if value is not None}


def start(code, cwd=None, **changes):
    """A fresh Python running ``code``."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=environment(**changes),
        cwd=cwd or Path("/"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(code, cwd=None, ok=True, **changes):
    """Its output, and its errors; fails the test if it fails (or, with ``ok=False``, if not)."""
    process = start(code, cwd, **changes)
    out, err = process.communicate(timeout=300)
    assert (process.returncode == 0) is ok, f"exit {process.returncode}\n{out}\n{err}"
    return out, err


def command(*arguments, **changes):
    """The command ``jitops`` in a process of its own: status, output, errors."""
    done = subprocess.run(
        [sys.executable, "-m", "ops", *map(str, arguments)],
        env=environment(**changes),
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout, done.stderr


def path_without(*programs, folder):
    """A PATH on which everything is found but these programs."""
    folder.mkdir()
    for place in reversed(os.environ["PATH"].split(os.pathsep)):
        for program in Path(place).iterdir() if Path(place).is_dir() else ():
            link = folder / program.name
            # Of a link to ccache, ccache would find itself alone.
            if program.name not in programs and program.resolve().name != "ccache":
                link.unlink(missing_ok=True)
                link.symlink_to(program)
    return str(folder)
