"""Which back end runs, in which environment: the table of ops/_backend.py, row by row."""

from __future__ import annotations

import importlib
import sys
import warnings

import pytest
import torch

import ops
from ops import _backend, _config, _extensions
from tests.helpers import path_without, run

LOSS = """
    import sys, warnings, torch, ops
    x = [torch.ones(2, 3, requires_grad=True) for _ in range(3)]
    loss = ops.improved_triplet_loss(*x, -1.0, 0.01, 0.002)
    loss.backward()
    print(type(loss.grad_fn).__name__)
"""
COMPILED = "ImprovedTripletLossFunctionBackward"
COMPILERS = ("c++", "g++", "clang++", "gcc", "cc", "clang")


@pytest.fixture
def settings(monkeypatch):
    """Set variables as if the process had been started with them."""

    def apply(**values):
        for name, value in values.items():
            monkeypatch.setenv(f"JITOPS_{name}", value)
        _config.settings.cache_clear()

    yield apply
    monkeypatch.undo()
    _config.settings.cache_clear()


def fresh_op(monkeypatch):
    """The op as it is before any choice was made."""
    importlib.import_module("ops.improved_triplet_loss")
    op = _backend._ops["improved_triplet_loss"]
    monkeypatch.setattr(op, "_chosen", {})
    return op


def triplet():
    return [torch.randn(3, 4, requires_grad=True) for _ in range(3)]


# ---- auto ----------------------------------------------------------------------------------------


def test_auto_compiles_nothing_without_a_gpu(tmp_path):
    """No compiler on PATH, no ninja, an unwritable cache: pure torch does not care."""
    out, err = run(
        LOSS + "    print('ops.jit._build' in sys.modules, 'filelock' in sys.modules)",
        PATH=str(tmp_path),
        JITOPS_CACHE_DIR="/proc/nowhere",
        JITOPS_BACKEND="auto",
        CUDA_VISIBLE_DEVICES="",
    )
    assert out.split() == ["MeanBackward0", "False", "False"]
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
    assert out.splitlines() == ["['ops']", "False", "[] False"]


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
    ({"nvcc": "release 99.1"}, "nvcc is newer than torch: .* is CUDA 99.1, torch .* is CUDA 12.4"),
    ({"nvcc": "release 10.2"}, "nvcc is older than torch: .* is CUDA 10.2, torch .* is CUDA 12.4"),
    ({"nvcc": "broken"}, "does not say which CUDA release it is"),
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


# ---- asked for -----------------------------------------------------------------------------------


def test_asked_for_and_given(backend, device):
    x = [t.to(device).detach().requires_grad_() for t in triplet()]
    node = type(ops.improved_triplet_loss(*x, -1.0, 0.0, 1.0).grad_fn).__name__
    assert (node == COMPILED) is (backend != "torch")


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
        _backend.choose("improved_triplet_loss", name, device)


def test_unknown_backend():
    with (
        pytest.raises(
            ops.ConfigError, match=r"backend must be one of auto, torch, cpp, cuda, got 'gpu'"
        ),
        ops.use_backend("gpu"),
    ):
        pass


def test_use_backend_nests_and_restores():
    assert _backend.requested() is None
    with ops.use_backend("torch"):
        with pytest.raises(ZeroDivisionError), ops.use_backend("auto"):
            assert _backend.requested() == "auto"
            1 / 0  # noqa: B018
        assert _backend.requested() == "torch"
    assert _backend.requested() is None


@pytest.mark.cpp
def test_environment_variable_loads_at_import(tmp_path):
    cache = tmp_path / "cache"
    code = "import ops.improved_triplet_loss"
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


@pytest.mark.cpp
def test_no_ninja(tmp_path):
    path = path_without("ninja", folder=tmp_path / "bin")
    env = {"JITOPS_BACKEND": "cpp", "JITOPS_CACHE_DIR": tmp_path / "cache", "PATH": path}
    _, err = run(
        "import importlib.util as u; f = u.find_spec\n"
        "u.find_spec = lambda n, *a: None if n == 'ninja' else f(n, *a)\n"
        "import ops.improved_triplet_loss",
        ok=False,
        **env,
    )
    assert "ninja not found" in err
    assert "pip install ninja" in err
    # The package brings its own: nobody need activate the virtual environment.
    out, _ = run("import ops.improved_triplet_loss as f; print('built')", **env)
    assert out.split() == ["built"]


# ---- JITOPS_FORCE_CPU and the other variables ----------------------------------------------------


def test_force_cpu():
    out, err = run(LOSS, JITOPS_FORCE_CPU="1", PATH="/nowhere")
    assert out.split() == ["MeanBackward0"]
    assert err == ""


def test_force_cpu_and_a_compiled_backend_contradict(settings):
    settings(FORCE_CPU="1", BACKEND="cpp")
    with pytest.raises(ops.ConfigError, match="JITOPS_FORCE_CPU forces the pure-torch path, but"):
        _config.settings()


def test_force_cpu_forbids_use_backend(settings):
    settings(FORCE_CPU="1")
    with (
        pytest.raises(ops.ConfigError, match=r"use_backend\('cpp'\) contradicts JITOPS_FORCE_CPU"),
        ops.use_backend("cpp"),
    ):
        pass


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("BACKEND", "gpu", "JITOPS_BACKEND must be one of auto, torch, cpp, cuda, got 'gpu'"),
        ("FORCE_CPU", "maybe", "JITOPS_FORCE_CPU must be 1 or 0 .*, got 'maybe'"),
        ("STRICT", "2", "JITOPS_STRICT must be 1 or 0 .*, got '2'"),
        ("CACHE_DIR", "here", "JITOPS_CACHE_DIR must be an absolute path .*, got 'here'"),
        ("BUILD_TIMEOUT", "soon", "JITOPS_BUILD_TIMEOUT must be a positive number of seconds, got"),
        ("BUILD_TIMEOUT", "-1", "JITOPS_BUILD_TIMEOUT must be a positive number of seconds, got"),
        ("BUILD_TIMEOUT", "nan", "JITOPS_BUILD_TIMEOUT must be a positive number of seconds, got"),
        ("PROGRESS", "x", "JITOPS_PROGRESS must be 1 or 0 .*, got 'x'"),
    ],
)
def test_unusable_variables(settings, name, value, text):
    settings(**{name: value})
    with pytest.raises(ops.ConfigError, match=text):
        _config.settings()


def test_unknown_variable_is_mentioned(settings):
    settings(BACKND="cpp")
    with pytest.warns(ops.ConfigWarning, match="JITOPS_BACKND is not a variable of jitops"):
        _config.settings()


def test_every_variable_is_documented(root):
    readme = (root / "README.md").read_text()
    for variable in _config.VARIABLES:
        assert f"| `{variable.name}` | " in readme, variable.name
        assert variable.meaning in readme, variable.name


# ---- explain, and torch.compile ------------------------------------------------------------------


def test_explain(compiled):
    (explanation,) = ops.explain("improved_triplet_loss")
    device = _backend.DEVICE_OF[compiled]
    assert explanation.runs[device] == compiled
    assert f"use_backend({compiled!r})" in explanation.reasons[device]
    with ops.use_backend("torch"):
        assert set(ops.explain()[0].runs.values()) == {"torch"}
    ops.improved_triplet_loss(*[t.to(device) for t in triplet()], -1.0, 0.0, 1.0)
    library = _extensions.extension("improved_triplet_loss", compiled).find()
    assert ops.explain()[0].compiled[compiled] == f"built: {library}"
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


def test_explain_unknown_op():
    with pytest.raises(
        ops.ArgumentError, match="names must be among improved_triplet_loss, got 'x'"
    ):
        ops.explain("x")


def test_compiled_graphs_follow_the_backend(compiled, device):
    """torch.compile retraces when another back end is asked for, and calls the fused operator."""
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
    assert "improved_triplet_loss_forward" in graphs[0]
    assert "improved_triplet_loss_forward" not in graphs[1]


# ---- the package's face --------------------------------------------------------------------------


def test_all_is_complete_and_sorted():
    assert ops.__all__ == sorted(ops.__all__)
    for name in ops.__all__:
        assert getattr(ops, name) is not None
        assert name in dir(ops)
    for module, names in ops._PUBLIC.items():
        if not module.startswith("_"):
            assert sorted(sys.modules[f"ops.{module}"].__all__) == sorted(names)
    with pytest.raises(AttributeError, match="module 'ops' has no attribute 'nothing'"):
        ops.nothing  # noqa: B018


def test_function_wins_over_the_module_of_its_name():
    import ops.improved_triplet_loss

    assert callable(ops.improved_triplet_loss)
    assert (
        sys.modules["ops.improved_triplet_loss"].improved_triplet_loss is ops.improved_triplet_loss
    )
    from ops.improved_triplet_loss import ImprovedTripletLoss

    assert ImprovedTripletLoss is ops.ImprovedTripletLoss


def test_no_warning_in_ordinary_use(backend, device):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x = [t.to(device).detach().requires_grad_() for t in triplet()]
        ops.improved_triplet_loss(*x, -1.0, 0.0, 1.0).backward()
