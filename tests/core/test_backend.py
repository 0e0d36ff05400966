"""Which back end runs, in which environment: the table of ops/selection.py, row by row."""

from __future__ import annotations

import importlib
import shutil
import warnings

import pytest
import torch

import ops
from ops._core import dispatch, selection
from tests.harness.forks import command, run
from tests.harness.helpers import COMPILED, LOSS, PURE_TORCH, path_without, triplet

COMPILERS = ("c++", "g++", "clang++", "gcc", "cc", "clang")


def fresh_op(monkeypatch):
    """The op as it is before any choice was made."""
    importlib.import_module("ops.losses.improved_triplet_loss")
    op = dispatch.built_in("improved_triplet_loss")
    monkeypatch.setattr(op, "_chosen", {})
    monkeypatch.setattr(op, "_loaded", {})
    return op


# ---- auto ----------------------------------------------------------------------------------------


def test_auto_compiles_nothing_without_a_gpu(tmp_path):
    """No compiler on PATH, no ninja, an unwritable cache: pure torch does not care."""
    out, err = run(
        LOSS + "    print('ops.jit._compile._build' in sys.modules, 'filelock' in sys.modules)",
        PATH=str(tmp_path),
        JITOPS_CACHE_DIR="/proc/nowhere",
        JITOPS_BACKEND="auto",
        CUDA_VISIBLE_DEVICES="",
    )
    assert out.split() == [PURE_TORCH, "False", "False"]
    assert err == ""


def test_import_is_light():
    out, _ = run(
        """
        import sys, torch
        before = set(sys.modules)
        import ops
        print(sorted(m for m in set(sys.modules) - before))
        print(torch.cuda.is_initialized())
        ops.ImprovedTripletLoss
        print([m for m in ('torch.utils.cpp_extension', 'torch._dynamo', 'filelock', 'rich')
               if m in set(sys.modules) - before], torch.cuda.is_initialized())
        """
    )
    assert out.splitlines() == ["['lazy_loader', 'ops', 'ops._operators']", "False", "[] False"]


class CudaTensor:
    """Stands in where only the device is looked at."""

    device = torch.device("cuda:0")


def test_auto_falls_back_with_one_warning(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    op = fresh_op(monkeypatch)
    with pytest.warns(ops.BackendWarning) as caught:
        assert op.backend_for(CudaTensor) == "torch"
        assert op.backend_for(CudaTensor) == "torch"
    assert len(caught) == 1
    assert str(caught[0].message) == (
        "improved_triplet_loss runs on the pure-torch path, since cuda cannot run: this torch "
        f"({torch.__version__}) is built without CUDA. JITOPS_BACKEND=torch asks for that path "
        "and silences this"
    )


# what goes wrong in the toolchain -> what the message says
BROKEN = [
    ({"CXX": "no-such-compiler"}, r"\$CXX is 'no-such-compiler', which is not found"),
    ({"PYTORCH_NVCC": "no-such-nvcc"}, "nvcc not found"),
    ({"nvcc": "release 99.1"}, "nvcc must be of CUDA 12, because torch .* is, got .*release 99.1"),
    ({"nvcc": "release 10.2"}, "nvcc must be of CUDA 12, because torch .* is, got .*release 10.2"),
    ({"nvcc": "broken"}, "nvcc must be of CUDA 12, because torch .* is, got .*broken"),
]


@pytest.mark.parametrize(("broken", "says"), BROKEN, ids=[says[:20] for _, says in BROKEN])
@pytest.mark.parametrize("asked", ["auto", "strict", "cuda"])
def test_broken_cuda_toolchain(monkeypatch, settings, tmp_path, broken, says, asked):
    """A warning and pure torch under auto, an error under JITOPS_STRICT or when asked for."""
    monkeypatch.setattr(torch.version, "cuda", "12.4")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    fake = tmp_path / "nvcc"
    fake.write_text(
        f"#!/bin/sh\necho 'Cuda compilation tools, {broken.get('nvcc', 'release 12.4')}'\n"
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PYTORCH_NVCC", str(fake))
    for name in ("CXX", "PYTORCH_NVCC"):
        if name in broken:
            monkeypatch.setenv(name, broken[name])
    settings(
        STRICT="1" if asked == "strict" else "0", BACKEND="cuda" if asked == "cuda" else "auto"
    )
    op = fresh_op(monkeypatch)
    if asked == "auto":
        with pytest.warns(ops.BackendWarning, match=says):
            assert op.backend_for(CudaTensor) == "torch"
    else:
        with pytest.raises(ops.BackendUnavailableError, match=says):
            op.backend_for(CudaTensor)


# ---- compiled ------------------------------------------------------------------------------------


@pytest.mark.cpp
def test_compiled_runs_cpp_on_the_cpu(tmp_path):
    out, err = run(
        LOSS, JITOPS_BACKEND="compiled", JITOPS_CACHE_DIR=tmp_path, CUDA_VISIBLE_DEVICES=""
    )
    assert out.split() == [COMPILED]
    assert err == ""


def test_compiled_prefers_cuda_for_cuda_tensors(monkeypatch):
    op = fresh_op(monkeypatch)
    assert op.choose("compiled", "cuda").backend == "cuda"
    assert op.choose("compiled", "cpu").backend == "cpp"


def test_compiled_leaves_other_devices_to_torch():
    x = [t.detach().to("meta").requires_grad_() for t in triplet()]
    with ops.use_backend("compiled"), warnings.catch_warnings():
        warnings.simplefilter("error")
        loss = ops.improved_triplet_loss(*x, -1.0, 0.0, 1.0)
        assert loss.is_meta
        assert torch.autograd.grad(loss, x)[0].shape == x[0].shape
    assert dispatch.built_in("improved_triplet_loss").choose("compiled", "mps").backend == "torch"


@pytest.mark.thorough
def test_compiled_without_a_compiler(tmp_path):
    """One warning and pure torch, or an error where that is forbidden."""
    env = {
        "JITOPS_BACKEND": "compiled",
        "JITOPS_CACHE_DIR": tmp_path / "cache",
        "PATH": path_without(*COMPILERS, folder=tmp_path / "bin"),
        "CXX": None,
        "CUDA_VISIBLE_DEVICES": "",
    }
    twice = f"{LOSS}    ops.improved_triplet_loss(*x, -1.0, 0.01, 0.002)"
    out, err = run(twice, **env)
    assert out.split() == [PURE_TORCH]
    assert err.count("BackendWarning") == 1
    assert (
        "improved_triplet_loss runs on the pure-torch path, since cpp cannot run: no C++ compiler"
        in err
    )
    _, err = run(LOSS, ok=False, **env, JITOPS_STRICT="1")
    assert (
        "BackendUnavailableError: improved_triplet_loss: JITOPS_STRICT=1 forbids falling back from "
        "'cpp': no C++ compiler" in err
    )
    _, out, _ = command("explain", "improved_triplet_loss", **env)
    assert "cpu  tensors -> torch  compiled falls back: cpp cannot run: no C++ compiler" in out


def test_an_op_without_that_back_end_runs_pure_torch():
    op = ops.Op("mine")
    with ops.use_backend("compiled"), warnings.catch_warnings():
        warnings.simplefilter("error")
        for device in ("cpu", "cuda", "meta"):
            assert op.choose("compiled", device).backend == "torch"
        assert op.backend_for(torch.ones(1)) == "torch"


@pytest.mark.cpp
def test_compiled_under_torch_compile():
    """The graph holds the operator that stands for the compiled kernels."""
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    x = triplet()
    loss = lambda *x: ops.improved_triplet_loss(*x, -1.0, 0.0, 1.0)  # noqa: E731
    with ops.use_backend("compiled"):
        result = torch.compile(loss, fullgraph=True, backend=keep)(*x)
        assert torch.equal(result, loss(*x))
    assert "jitops.improved_triplet_loss" in graphs[0].code


def test_a_fall_back_under_torch_compile_warns_once(monkeypatch):
    op = fresh_op(monkeypatch)

    def fails(backend):
        raise ops.BuildError("no")

    monkeypatch.setattr(op, "load", fails)
    loss = lambda *x: ops.improved_triplet_loss(*x, -1.0, 0.0, 1.0)  # noqa: E731
    with ops.use_backend("compiled"), pytest.warns(ops.BackendWarning) as caught:
        for rows in (3, 4, 5):
            torch._dynamo.reset()
            x = [torch.randn(rows, 4) for _ in range(3)]
            compiled = torch.compile(loss, fullgraph=True, backend="eager")
            torch.testing.assert_close(compiled(*x), loss(*x))
    assert len([one for one in caught if one.category is ops.BackendWarning]) == 1


@pytest.mark.cpp
def test_compiled_is_explained():
    with ops.use_backend("compiled"):
        (told,) = ops.explain("improved_triplet_loss")
    assert told.runs["cpu"] == "cpp"
    assert told.reasons["cpu"] == "compiled prefers it for cpu tensors"


# ---- asked for -----------------------------------------------------------------------------------


def test_asked_for_and_given(backend, device):
    x = [t.to(device).detach().requires_grad_() for t in triplet()]
    node = type(ops.improved_triplet_loss(*x, -1.0, 0.0, 1.0).grad_fn).__name__
    assert node == (PURE_TORCH if backend == "torch" else COMPILED)


@pytest.mark.parametrize("name", ["cpp", "cuda"])
def test_wrong_device_is_an_error(name):
    device = "cuda" if name == "cpp" else "cpu"
    with (
        ops.use_backend(name),
        pytest.raises(
            ops.BackendUnavailableError,
            match=f"{name!r} was asked for .* and serves .* tensors, got {device} tensors",
        ),
    ):
        dispatch.built_in("improved_triplet_loss").choose(name, device)


def test_unknown_backend():
    with (
        pytest.raises(
            ops.ConfigError,
            match=r"backend must be one of auto, torch, cpp, cuda, compiled, got 'gpu'",
        ),
        ops.use_backend("gpu"),
    ):
        pass


def test_use_backend_nests_and_restores():
    assert selection.requested() is None
    with ops.use_backend("torch"):
        with pytest.raises(ZeroDivisionError), ops.use_backend("auto"):
            assert selection.requested() == "auto"
            1 / 0  # noqa: B018
        assert selection.requested() == "torch"
    assert selection.requested() is None


@pytest.mark.thorough
@pytest.mark.cpp
def test_environment_variable_loads_at_import(tmp_path):
    cache = tmp_path / "cache"
    code = "import ops.losses.improved_triplet_loss"
    _, err = run(code, JITOPS_BACKEND="cpp", JITOPS_CACHE_DIR=cache, JITOPS_PROGRESS="1")
    assert "jitops: compiled jitops_improved_triplet_loss_cpp (1 file) in" in err
    out, err = run(LOSS, JITOPS_BACKEND="cpp", JITOPS_CACHE_DIR=cache, JITOPS_PROGRESS="1")
    assert out.split() == [COMPILED]
    assert err == ""


@pytest.mark.cpp
def test_no_compiler(tmp_path):
    """Cached: works. Not cached: a typed error that says what to install."""
    cache, path = tmp_path / "cache", path_without(*COMPILERS, folder=tmp_path / "bin")
    env = {"JITOPS_BACKEND": "cpp", "JITOPS_CACHE_DIR": cache}
    _, err = run(LOSS, ok=False, PATH=path, **env)
    assert "BackendUnavailableError: improved_triplet_loss: back end 'cpp' was asked for" in err
    assert "no C++ compiler found" in err
    assert "apt install g++" in err
    run(LOSS, **env)
    out, _ = run(LOSS, PATH=path, **env)
    assert out.split() == [COMPILED]


@pytest.mark.thorough
@pytest.mark.cpp
def test_no_ninja(tmp_path):
    path = path_without("ninja", folder=tmp_path / "bin")
    env = {"JITOPS_BACKEND": "cpp", "JITOPS_CACHE_DIR": tmp_path / "cache", "PATH": path}
    hide = (
        "import os; real = os.access; "
        "os.access = lambda path, mode: not str(path).endswith('/ninja') and real(path, mode); "
    )
    _, err = run(f"{hide} import ops.losses.improved_triplet_loss", ok=False, **env)
    assert "ninja not found" in err
    assert "pip install ninja" in err
    # The package brings its own: nobody need activate the virtual environment.
    out, _ = run("import ops.losses.improved_triplet_loss as f; print('built')", **env)
    assert out.split() == ["built"]


@pytest.mark.thorough
def test_an_op_that_could_not_be_built_can_be_tried_again(tmp_path):
    """In the same process, as in a notebook: the same error, and none once there is a compiler."""
    out, _ = run(
        """
        import os, ops
        with_compiler, os.environ["PATH"] = os.environ["PATH"], os.environ["WITHOUT"]
        for _ in range(2):
            try:
                ops.improved_triplet_loss
            except ops.BackendUnavailableError as error:
                print("no C++ compiler" in str(error))
        os.environ["PATH"] = with_compiler
        print(ops.improved_triplet_loss.__name__)
        """,
        JITOPS_BACKEND="cpp",
        JITOPS_CACHE_DIR=tmp_path / "cache",
        WITHOUT=path_without(*COMPILERS, folder=tmp_path / "bin"),
        CXX=None,
    )
    assert out.split() == ["True", "True", "improved_triplet_loss"]


@pytest.mark.thorough
@pytest.mark.cpp
def test_reload(tmp_path, root):
    """An edited kernel takes the place of the one that is loaded; whatever holds the op runs it."""
    for folder in ("ops", "cuda_src"):
        shutil.copytree(root / folder, tmp_path / folder)
    out, _ = run(
        """
        import pathlib, torch, ops
        from ops._core import dispatch
        source = pathlib.Path("cuda_src/improved_triplet_loss.h")
        x = torch.ones(2, 3)
        op = dispatch.built_in("improved_triplet_loss")
        def loss():
            return ops.improved_triplet_loss(x, x, x, -1.0, 0.0, 1.0).item()
        print(loss())
        text = source.read_text()
        source.write_text(text + "#error not yet")
        try:
            op.reload()
        except ops.BuildError as error:
            print("not yet" in str(error))
        bounded = "return x < bound ? bound : x;"
        assert bounded in text
        source.write_text(text.replace(bounded, "return 7;"))
        print(loss())
        source.write_text(text)
        op.reload()
        print(loss())
        """,
        cwd=tmp_path,
        JITOPS_BACKEND="cpp",
        JITOPS_CACHE_DIR=tmp_path / "cache",
        PYTHONPATH=tmp_path,
    )
    first, told, edited, last = out.split()
    assert (told, edited, last) == ("True", "14.0", first)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (("lltm",), ops.ArgumentError, "name must not be that of a built-in op, got 'lltm'"),
        ((3,), ops.ArgumentTypeError, "name must be a string, got int"),
        (("mine", "text"), ops.ArgumentTypeError, "cpp must be an Extension, .* got str"),
    ],
)
def test_bad_ops(arguments, error, text):
    with pytest.raises(error, match=text):
        ops.Op(*arguments)
    assert ops.explain("lltm")[0].op == "lltm"
    with pytest.raises(ops.ArgumentError):
        ops.explain("mine")
