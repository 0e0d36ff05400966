"""torch's default header, precompiled in our own cache: slow to test, since it is what is slow."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch

from ops.jit import _precompiled, text
from ops.jit._cache import _inventory
from tests.helpers import run
from tests.jit.support import leftovers

pytestmark = pytest.mark.cpp

BUILD = """
    import torch, ops.jit
    module = ops.jit.load_inline(
        {name!r},
        "torch::Tensor times(torch::Tensor x) {{ return x * {number}; }}",
        functions={{"times": 'times "{number}" \\\\ {number}\\nand ??= no trigraph'}},
        build_directory={folder!r},
    )
    assert module.times(torch.ones(2)).tolist() == [{number}.0] * 2
    assert module.times.__doc__.endswith('times "{number}" \\\\ {number}\\nand ??= no trigraph\\n')
    try:
        module.times(5)
    except TypeError:
        print("ran")
"""


def build(cache, tmp_path, number, **variables):
    folder = tmp_path / f"build{number}"
    out, _ = run(
        BUILD.format(name=f"times{number}", number=number, folder=str(folder)),
        JITOPS_CACHE_DIR=cache,
        **variables,
    )
    assert out == "ran\n"
    (command,) = [
        line
        for line in (folder / "compile_commands.json").read_text().splitlines()
        if '"command"' in line
    ]
    return "/precompiled " in command


def headers(cache):
    return [item for item in _inventory.items(cache) if item.name == _precompiled.NAME]


def test_the_second_build_takes_what_the_first_had_made(cache, tmp_path):
    """Functions with docstrings, as torch binds them; and torch's own folders stay as they are."""
    include = Path(torch.__file__).parent / "include" / "torch"
    before = sorted(path.name for path in include.iterdir())
    assert not build(cache, tmp_path, 2)
    deadline = time.time() + 300
    while not headers(cache):
        assert time.time() < deadline
        time.sleep(0.5)
    assert build(cache, tmp_path, 3)
    (item,) = headers(cache)
    assert item.hits == 1
    # A damaged one is not used; nor is one for other flags.
    item.entry.library.chmod(0o644)
    os.truncate(item.entry.library, 1000)
    assert not build(cache, tmp_path, 4, JITOPS_PCH="0")
    assert sorted(path.name for path in include.iterdir()) == before
    assert leftovers(cache) == []


@pytest.mark.parametrize(
    "arguments",
    [
        {"no_implicit_headers": True},
        {"extra_cflags": ["-include", "cmath"]},
        {"extra_include_paths": ["torch"]},
    ],
)
def test_where_it_cannot_serve_it_is_not_made(cache, tmp_path, arguments, monkeypatch):
    (tmp_path / "has" / "torch").mkdir(parents=True)
    if "extra_include_paths" in arguments:
        arguments = {"extra_include_paths": [tmp_path / "has"]}
    assert _precompiled._request(text("x", "int x;", **arguments).spec) is None
    assert _precompiled._request(text("x", "int x;").spec) is not None
