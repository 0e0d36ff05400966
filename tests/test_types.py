"""The types of the public names, as mypy sees them in the code of a user."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.harness.helpers import PACKAGE, environment

pytestmark = pytest.mark.lint

# Of torch and others, whose types take long to read, nothing is known here.
CONFIG = """
[mypy]
strict = true
disallow_subclassing_any = false
[mypy-ops.*]
follow_imports = silent
[mypy-torch.*,numpy.*,scipy.*,matplotlib.*,sklearn.*]
follow_imports = skip
"""

# A line with a comment must have that error, and no other line may have one.
USER = """
from pathlib import Path
from types import ModuleType

import torch

import ops
from ops.jit import Extension, load, load_inline, text

x = torch.ones(2, 3)
module: ModuleType = load_inline("a", "")
module = load("a", ["b.cpp", Path("c.cpp")], extra_cflags=("-O2",), is_python_module=True)
module = load("a", "b.cpp", None, None, None, None, None, "folder", True)
library: str = load_inline("a", "", is_python_module=False, no_implicit_headers=True)
library = load("a", "b.cpp", is_python_module=False)
program: str = load("a", "b.cpp", is_standalone=True)
load_inline("a", "", is_python_module=False, functoins="f")  # Unexpected keyword argument
load("a", "b.cpp", extra_cflags=3)  # incompatible type "int"
extension: Extension = text("a", "")

criterion = ops.ImprovedTripletLoss(-1.0, 0.01, 0.002, reduction="sum")
ops.improved_triplet_loss(x, x, x, -1.0, 0.01, 0.002, reduction="avg")  # type "Literal['avg']"
ops.ImprovedTripletLoss(-1.0, 0.01, 0.002, reduction="avg")  # incompatible type "Literal['avg']"
ops.batch_all_triplet_loss(x, x, 0.2, reduction="mean_all", distance="cosine")
ops.batch_all_triplet_loss(x, x, 0.2, distance="l2")  # incompatible type "Literal['l2']"
ops.BatchHardTripletLoss(0.2, incomplete="keep")  # incompatible type "Literal['keep']"
ops.BatchSemiHardTripletLoss(0.2, negatives="some")  # incompatible type "Literal['some']"
ops.info_nce_loss(x, x, form="two_ways")  # incompatible type "Literal['two_ways']"
ops.scipy_conv2d(x, x, mode="big")  # incompatible type "Literal['big']"
ops.margin_softmax_loss(x, x, x, form="sphere")  # incompatible type "Literal['sphere']"
ops.Misspelt  # Module has no attribute "Misspelt"
with ops.use_backend("cpp"):
    pass
with ops.use_backend("gpu"):  # incompatible type "Literal['gpu']"
    pass
ok: bool = ops.check_gradients(torch.sin, x, backends=["torch", "cpp"]).ok
ops.check_gradients(torch.sin, x, backends=["gpu"])  # incompatible type "Literal['gpu']"
ops.lltm_sequence(x)  # Missing positional arguments
"""


def test_mypy_on_the_code_of_a_user(tmp_path):
    (tmp_path / "mypy.ini").write_text(CONFIG)
    (tmp_path / "user.py").write_text(USER)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--cache-dir=cache", "user.py"],
        cwd=tmp_path,
        env=environment(MYPYPATH=PACKAGE),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    found = dict(re.findall(r"^user\.py:(\d+): error: (.+)", done.stdout, re.MULTILINE))
    wanted = {
        str(number): line.partition("  # ")[2]
        for number, line in enumerate(USER.splitlines(), start=1)
        if "  # " in line
    }
    assert found.keys() == wanted.keys(), done.stdout
    for number, message in wanted.items():
        assert message in found[number]
