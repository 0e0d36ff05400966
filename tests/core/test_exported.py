"""Exported programs in a fresh process, which imports ``ops`` alone, on the path that is there.

The file is also the program that exports them.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch

import ops
from ops import _operators
from tests.harness.forks import run
from tests.harness.helpers import ROOT

KERNELS = ["batch_all_triplet_loss", "batch_hard_triplet_loss", "improved_triplet_loss", "lltm"]


class Model(torch.nn.Module):
    """All ops that graphs hold. The inputs are six rows of four columns."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(4, 4)
        self.unit = ops.LLTM(4, 3)

    def forward(self, x, y, z):
        x = self.first(x)
        labels = torch.arange(6) % 3
        output, state = self.unit(torch.stack((x, y)))
        return (
            ops.improved_triplet_loss(x, y, z, -1.0, 0.1, 0.5),
            ops.batch_hard_triplet_loss(x, labels),
            ops.batch_all_triplet_loss(x, labels),
            ops.batch_semi_hard_triplet_loss(x, labels),
            ops.info_nce_loss(x, y),
            ops.supcon_loss(x, labels),
            ops.linear_cross_entropy(x, y, labels),
            ops.linear_log_prob(x, y, labels)[0].sum(),
            ops.linear(x, y).sum(),
            ops.normalize_with_norm(x).direction.sum(),
            *(value.sum() for value in self.unit(x)),
            output.sum(),
            state.cell.sum(),
        )


def main(folder):
    torch.manual_seed(0)
    model, inputs = Model(), tuple(torch.randn(6, 4) for _ in range(3))
    for backend in ("torch", "cpp"):
        with ops.use_backend(backend):
            program = torch.export.export(model, inputs)
            torch.export.save(program, f"{folder}/{backend}.pt2")
            torch.export.save(program.run_decompositions(), f"{folder}/{backend}_inference.pt2")
    sum(model(*inputs)).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    torch.save((inputs, model(*inputs), gradients), f"{folder}/expected.pt")


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("programs")
    command = [sys.executable, "-m", "tests.core.test_exported", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True)
    return folder


# {imports} stands for one line or two. It prints which operators a program holds, the errors, and
# the ops whose libraries this process has loaded.
PROGRAM = """
    {imports}
    inputs, expected, gradients = torch.load({folder!r} + "/expected.pt")
    program = torch.export.load({folder!r} + "/{name}.pt2")
    names = {{str(node.target) for node in program.graph.nodes}}
    module = program.module()
    results = module(*inputs)
    for one, other in zip(results, expected, strict=True):
        torch.testing.assert_close(one, other)
    if "inference" not in {name!r}:
        sum(results).backward()
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(parameter.grad, gradients[name])
    from ops._core.dispatch import known
    print(*sorted(name for name in names if name.startswith("jitops")))
    print(sorted(name for name, op in known().items() if op._loaded))
"""
FIRST, SECOND = "import ops; import torch", "import torch; import ops"


def program(folder, name, imports=FIRST):
    return textwrap.dedent(PROGRAM).format(folder=str(folder), name=name, imports=imports)


@pytest.mark.thorough
@pytest.mark.cpp
@pytest.mark.parametrize(
    ("name", "imports"), [("cpp", FIRST), ("cpp_inference", SECOND)], ids=["cpp", "inference"]
)
def test_on_compiled_kernels(programs, name, imports):
    out, err = run(program(programs, name, imports))
    assert "jitops.lltm_sequence" in out
    assert out.splitlines()[-1] == str(KERNELS)
    assert "Warning" not in err


@pytest.mark.thorough
@pytest.mark.cpp
@pytest.mark.parametrize("name", ["cpp", "cpp_inference"])
def test_without_a_compiler(programs, tmp_path, name):
    """It runs tensor code, and says why."""
    missing = {"CXX": "/nonexistent", "JITOPS_CACHE_DIR": tmp_path}
    out, err = run(program(programs, name), **missing)
    assert out.splitlines()[-1] == "[]"
    for kernels in KERNELS:
        assert f"{kernels} runs on the pure-torch path, since cpp cannot run: $CXX" in err


@pytest.mark.cpp
@pytest.mark.thorough
@pytest.mark.parametrize("name", ["cpp", "cpp_inference"])
def test_a_back_end_requested_by_name(programs, tmp_path, name):
    missing = {"CXX": "/nonexistent", "JITOPS_CACHE_DIR": tmp_path}
    out, err = run(program(programs, name), JITOPS_BACKEND="torch", **missing)
    assert out.splitlines()[-1] == "[]"
    assert "Warning" not in err
    _, err = run(program(programs, name), JITOPS_BACKEND="cpp", ok=False, **missing)
    assert "BackendUnavailableError: " in err


@pytest.mark.cpp
@pytest.mark.thorough
@pytest.mark.parametrize("name", ["torch", "torch_inference"])
def test_exported_from_tensor_code(programs, name):
    out, err = run(program(programs, name))
    assert out.splitlines()[-1] == "[]"
    assert "jitops.batch_all_triplet_loss_in_torch" in out
    assert "Warning" not in err


def test_a_backward_kernel_has_no_tensor_code():
    _, err = run(
        """
        import ops, torch
        x = torch.ones(2, 3)
        _, state = torch.ops.jitops.improved_triplet_loss_forward(x, x, x, 0., 0., 1., 0., 1)
        print(state)
        torch.ops.jitops.improved_triplet_loss_backward(
            x.sum(), x, x, x, state, 1., 0., 1, True, True, True)
        """,
        ok=False,
        JITOPS_BACKEND="torch",
    )
    assert err.splitlines()[-1].endswith(
        "BackendUnavailableError: improved_triplet_loss: this graph has the backward kernel of a "
        "compiled back end, which cannot run here: export or compile the graph here"
    )


def test_a_forward_kernel_that_forms_gradients_has_tensor_code():
    """No backward kernel runs that could refuse."""
    out, _ = run(
        """
        import ops, torch
        x, labels = torch.tensor([[0.0], [3.0], [1.0]]), torch.tensor([0, 0, 1])
        loss, _, factor, gradient, _ = torch.ops.jitops.batch_all_triplet_loss_forward(
            x, labels, None, None, 0.5, False, False, 0, False, 1, True, False)
        print(loss.item(), (factor * gradient).flatten().tolist())
        """,
        JITOPS_BACKEND="torch",
    )
    assert out == "2.0 [-0.5, 0.5, 0.0]\n"


@pytest.mark.thorough
def test_every_operator_is_found_by_its_name():
    """Imports one module after the other, and lists the operators that it and others declare."""
    out, _ = run(
        """
        import importlib, pkgutil, sys, ops, torch
        names = lambda: {n for n in torch._C._dispatch_get_all_op_names() if n[:8] == "jitops::"}
        before = names()
        for room in ("ops._core", "ops.losses", "ops.layers"):
            for module in pkgutil.iter_modules(importlib.import_module(room).__path__, room + "."):
                loaded = set(sys.modules)
                importlib.import_module(module.name)
                for name in names() - before:
                    print(name[8:], *set(sys.modules) - loaded)
                before = names()
        """
    )
    declared = {name: modules for name, *modules in map(str.split, out.splitlines())}
    assert {"lltm_sequence_backward", "hardest_pairs", "batch_all_triplet_loss"} <= set(declared)
    for operator, modules in declared.items():
        assert set(modules) & set(_operators.modules_of(operator)), operator


def test_lookups_before_any_op_is_imported():
    """One module is imported, and nothing for a name that does not exist or is not ours."""
    out, _ = run(
        """
        import sys, ops, torch
        print(hasattr(torch.ops.aten, "nothing"), hasattr(torch.ops.jitops, "__wrapped__"))
        print([name for name in sys.modules if name.startswith("ops.")])
        print(torch.ops.jitops.lltm_forward.default)
        print([name for name in sys.modules if name.startswith(("ops.losses.", "ops.layers."))])
        print(hasattr(torch.ops.jitops, "nothing"), type(torch.ops.jitops).__module__)
        call = torch.compile(lambda x: torch.ops.jitops.improved_triplet_loss(
            x, 2 * x, 3 * x, 0., 0., 1., 0., 1), fullgraph=True, backend="aot_eager")
        print(call(torch.ones(2, 3)))
        """,
        JITOPS_BACKEND="torch",
    )
    assert out.splitlines() == [
        "False False",
        "['ops._operators']",
        "jitops.lltm_forward.default",
        "['ops.layers.lltm']",
        "False torch._ops",
        "tensor(3.)",
    ]


def test_torch_that_is_missing():
    """``import ops`` works, and ``import torch`` raises the same error as without it."""
    _, err = run(
        """
        import sys, ops
        sys.modules["torch"] = None
        import torch
        """,
        ok=False,
    )
    assert "ModuleNotFoundError: import of torch halted; None in sys.modules" in err


if __name__ == "__main__":
    main(*sys.argv[1:])
