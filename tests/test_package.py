"""The public face of the package: its names, ops.explain(), torch.compile."""

from __future__ import annotations

import ast
import importlib
import warnings

import pytest
import torch

import ops
from ops._core import selection
from ops._core.dispatch import built_in
from tests.cuda import emulator as cuda_emulator
from tests.harness.forks import run
from tests.harness.helpers import triplet

# ---- explain, and torch.compile ------------------------------------------------------------------


def test_explain(compiled):
    (explanation,) = ops.explain("improved_triplet_loss")
    name = "cpp" if compiled == cuda_emulator.NAME else compiled  # emulated CUDA has the name cpp
    device = selection.DEVICE_OF[name]
    assert explanation.runs[device] == name
    assert f"use_backend({name!r})" in explanation.reasons[device]
    with ops.use_backend("torch"):
        assert set(ops.explain("improved_triplet_loss")[0].runs.values()) == {"torch"}
    ops.improved_triplet_loss(*[t.to(device) for t in triplet()], -1.0, 0.0, 1.0)
    extension = built_in("improved_triplet_loss").extension(name)
    library = extension.find()
    assert ops.explain("improved_triplet_loss")[0].compiled[name] == f"built: {library}"
    assert str(library) in str(ops.explain())


def test_explain_builds_nothing(tmp_path):
    out, _ = run(
        "import ops, sys; print(ops.explain()); print('torch.utils.cpp_extension' in sys.modules)",
        JITOPS_BACKEND="cpp",
        JITOPS_CACHE_DIR=tmp_path / "cache",
    )
    assert "not built yet: the first call that needs it compiles it" in out
    assert out.splitlines()[-1] == "False"
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"JITOPS_FORCE_CPU": "1"}, "not built yet, and with JITOPS_FORCE_CPU=1 no call needs it"),
        (
            {"JITOPS_BUILD": "never", "JITOPS_BACKEND": "cpp"},
            "cpu  tensors -> error  lltm: back end 'cpp' was asked for and cannot run: "
            "jitops_lltm_cpp is not built yet, and JITOPS_BUILD=never",
        ),
        (
            {"JITOPS_BUILD": "never", "JITOPS_BACKEND": "compiled"},
            "cpu  tensors -> torch  compiled falls back: cpp cannot run: "
            "jitops_lltm_cpp is not built yet, and JITOPS_BUILD=never",
        ),
        (
            {"JITOPS_SANITIZE": "address", "JITOPS_BACKEND": "cpp"},
            "cannot run: JITOPS_SANITIZE=address needs the sanitizer's runtime in the process",
        ),
    ],
)
@pytest.mark.cpp
def test_explain_says_what_a_call_would_do(tmp_path, setting, words):
    out, _ = run("import ops; print(ops.explain())", JITOPS_CACHE_DIR=tmp_path, **setting)
    assert words in out


def test_explain_unknown_op():
    with pytest.raises(ops.ArgumentError, match="names must be among .* lltm, got 'x'"):
        ops.explain("x")


def test_compiled_graphs_follow_the_backend(compiled, device):
    """torch.compile retraces for another back end, and calls the fused operator."""
    graphs = []

    def keep(graph, _):
        graphs.append(str(graph.code) + str([str(m.code) for m in graph.children()]))
        return graph

    torch._dynamo.reset()
    loss = torch.compile(
        lambda *t: ops.improved_triplet_loss(*t, -1.0, 0.0, 1.0), fullgraph=True, backend=keep
    )
    x = [t.to(device).detach().requires_grad_() for t in triplet()]
    fused = loss(*x)
    with ops.use_backend("torch"):
        plain = loss(*x)
    torch.testing.assert_close(fused, plain)
    assert len(graphs) == 2
    assert "jitops.improved_triplet_loss" in graphs[0]
    assert "jitops.improved_triplet_loss" not in graphs[1]


# ---- public names --------------------------------------------------------------------------------


def test_all_is_complete_and_sorted():
    assert ops.__all__ == sorted(ops.__all__)
    for name in ops.__all__:
        assert getattr(ops, name) is not None
        assert name in dir(ops)
    with pytest.raises(AttributeError, match="No ops attribute nothing"):
        ops.nothing  # noqa: B018


def test_a_module_exports_what_the_package_does(root):
    """``__all__`` of a module agrees with the stub, which is the one list of public names."""
    tree = ast.parse((root / "ops/__init__.pyi").read_text())
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith("_"):
            module = importlib.import_module(f"ops.{node.module}")
            assert sorted(module.__all__) == sorted(alias.name for alias in node.names)


def test_no_warning_in_ordinary_use(backend, device):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x = [t.to(device).detach().requires_grad_() for t in triplet()]
        ops.improved_triplet_loss(*x, -1.0, 0.0, 1.0).backward()


WITHOUT = """
    import sys
    sys.modules[{package!r}] = None  # as if it were not installed
    import torch
    from ops import *
    try:
        {call}
    except DependencyError as error:
        print(isinstance(error, ImportError), error)
"""


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("package", "op", "call"),
    [
        ("numpy", "rfft2_magnitude", "rfft2_magnitude(torch.ones(2, 2))"),
        ("scipy", "scipy_conv2d", "scipy_conv2d(torch.ones(2, 2), torch.ones(1, 1))"),
        ("scipy", "set_matching_loss", "set_matching_loss(torch.ones(1, 1, 1))"),
        (
            "scipy",
            "hausdorff_dt_loss",
            "hausdorff_dt_loss(torch.eye(2)[None, None], torch.zeros(1, 1, 2, 2))",
        ),
    ],
)
def test_a_missing_package_is_named_with_its_extra(package, op, call):
    out, _ = run(WITHOUT.format(package=package, call=call), JITOPS_FORCE_CPU="1")
    assert out.strip() == (
        f"True {op} needs {package}, which is not installed: pip install {package}, "
        f"or jitops with its extra [scipy]"
    )
