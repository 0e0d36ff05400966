"""What is tested is told, never guessed: --backends. A back end that is told and missing fails."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

# Before ops is imported: no setting of the user's leaks in, and no test touches the user's cache.
for _name in [name for name in os.environ if name.startswith("JITOPS_")]:
    del os.environ[_name]
# Several runs may share one cache, as the workers of pytest-xdist do. Its owner removes it.
_GIVEN = os.environ.get("TESTS_CACHE_DIR")
_CACHE = _GIVEN or tempfile.mkdtemp(prefix="jitops-tests-")
os.environ["JITOPS_CACHE_DIR"] = os.environ["TESTS_CACHE_DIR"] = _CACHE
os.environ["JITOPS_PROGRESS"] = "0"
os.environ["JITOPS_PCH"] = "0"  # no process of ours outlives the tests

import torch  # noqa: E402

import ops  # noqa: E402
from ops import _config  # noqa: E402
from ops._core import dispatch  # noqa: E402
from ops.jit._compile import _compilers  # noqa: E402
from tests.cuda import emulator as cuda_emulator  # noqa: E402
from tests.harness.battery import Battery  # noqa: E402
from tests.harness.op_under_test import EMULATED, QUICK_OF_A_VARIATION  # noqa: E402

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # threads of several workers would wait for each other

QUICK = "not thorough"  # what `make test` selects
# Modules that `make test` leaves out. A single test has the mark `thorough` instead.
THOROUGH = (
    "cuda.test_cuda_compiles",
    "cuda.test_cuda_emulator",
    "cuda.test_run_book",
    "jit.test_crowds",
    "jit.test_debug",
    "jit.test_failures",
    "jit.test_faults",
    "jit.test_killed",
    "jit.test_mounts",
    "jit.test_odd_paths",
    "jit.test_pch",
    "jit.test_processes",
    "jit.test_reload",
    "jit.test_stale",
    "losses.test_peers",
)
# The packages of the extra `peers`.
PEERS = ("info_nce", "monai", "online_triplet_loss", "pytorch_metric_learning", "pysdtw",
         "pytorch_msssim", "sentence_transformers", "torchmetrics")  # fmt: skip
DEVICES = {"torch": "cpu", "cpp": "cpu", cuda_emulator.NAME: "cpu", "cuda": "cuda"}


def pytest_addoption(parser):
    parser.addoption(
        "--backends",
        default=None,
        help="back ends to test, as in torch,cpp,cuda-emulated,cuda. Default: all, cuda only where "
        "there is a GPU. One that cannot run fails the run.",
    )
    parser.addoption(
        "--nvcc",
        choices=("auto", "yes", "no"),
        default="auto",
        help="compile the CUDA sources with nvcc (auto: where there is one)",
    )


def pytest_configure(config):
    told = config.getoption("--backends")
    if told is None:
        here = {
            "cuda": torch.cuda.is_available(),
            cuda_emulator.NAME: sys.platform == "linux",  # it reads ELF's tables
        }
        told = ",".join(name for name in DEVICES if here.get(name, True))
    config.backends = told.split(",")
    unknown = set(config.backends) - set(DEVICES)
    if unknown:
        raise pytest.UsageError(f"--backends: no such back end: {', '.join(sorted(unknown))}")
    if set(config.backends) - {"torch"}:
        try:
            _compilers.check(with_cuda="cuda" in config.backends)
        except ops.ToolchainError as error:
            raise pytest.UsageError(f"--backends={told}: {error}") from None
    if "cuda" in config.backends:
        if not torch.cuda.is_available():
            raise pytest.UsageError(f"--backends={told}: torch sees no GPU")
        # cuBLAS reads it when it starts: without, its products are not deterministic.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    choice = config.getoption("--nvcc")
    if choice == "yes" and _compilers.nvcc() is None:
        raise pytest.UsageError(f"--nvcc=yes: {_compilers.NO_NVCC}")
    config.quick = config.getoption("markexpr") == QUICK
    config.mounts = _can_mount()
    config.lint = all(map(importlib.util.find_spec, ("ruff", "mypy")))
    config.peers = all(map(importlib.util.find_spec, PEERS))
    config.tmux = shutil.which("tmux") is not None
    config.nvcc = choice != "no" and _compilers.nvcc() is not None


def _can_mount():
    """Whether this process may mount: root, but not in every container."""
    if os.geteuid() != 0:
        return False
    folder = tempfile.mkdtemp(prefix="jitops-mount-")
    try:
        command = ["mount", "-t", "tmpfs", "tmpfs", folder]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            return False
        subprocess.run(["umount", folder], check=True)
    except FileNotFoundError:
        return False
    else:
        return True
    finally:
        os.rmdir(folder)


def pytest_unconfigure():
    if not _GIVEN:
        shutil.rmtree(_CACHE, ignore_errors=True)


def _not_run(config):
    missing = [name for name in DEVICES if name not in config.backends]
    if config.quick:
        missing.append("the thorough tests (make test-all)")
    if not config.mounts:
        missing.append("full, read-only and noexec disks, other users (only root can)")
    if not config.lint:
        missing.append("ruff and mypy on a new op (not installed)")
    if not config.peers:
        missing.append("comparisons with other packages' losses (not installed: the extra peers)")
    if not config.tmux:
        missing.append("the command in a terminal (no tmux)")
    if not config.nvcc:
        missing.append("compiling the CUDA sources (no nvcc)")
    return missing


def pytest_report_header(config):
    return f"back ends under test: {', '.join(config.backends)}; torch {torch.__version__}"


def pytest_terminal_summary(terminalreporter, config):
    missing = _not_run(config)
    if missing:
        terminalreporter.write_line(f"NOT RUN here: {', '.join(missing)}", yellow=True, bold=True)


def pytest_collection_modifyitems(config, items):
    told = {
        "lint": config.lint,
        "peers": config.peers,
        "tmux": config.tmux,
        "nvcc": config.nvcc,
        "mounts": config.mounts,
        "cpp": "cpp" in config.backends,
        "cuda": "cuda" in config.backends,
        "emulator": cuda_emulator.NAME in config.backends,
    }
    off = [name for name, on in told.items() if not on]
    items[:] = [item for item in items if _applies(item)]
    unwanted = [item for item in items if any(map(item.get_closest_marker, off))]
    if unwanted:
        config.hook.pytest_deselected(items=unwanted)
        items[:] = [item for item in items if item not in unwanted]
    # Last: emulated CUDA takes the place of back end cpp, which costs more than a test.
    items.sort(key=_is_emulated)
    for item in items:
        if (
            _is_emulated(item)
            or not _is_quick(item)
            or item.module.__name__.removeprefix("tests.") in THOROUGH
        ):
            item.add_marker("thorough")


def _is_emulated(item):
    return hasattr(item, "callspec") and cuda_emulator.NAME in item.callspec.params.values()


def _is_of_the_battery(item):
    return (
        item.cls is not None
        and issubclass(item.cls, Battery)
        and hasattr(Battery, item.originalname)
        and item.originalname not in vars(item.cls)
    )


def _is_quick(item):
    """Whether `make test` runs it: of a variation of an op, only few checks of the battery."""
    described = getattr(item.cls, "op", None)
    return (
        not getattr(described, "variation", False)
        or not _is_of_the_battery(item)
        or item.originalname in QUICK_OF_A_VARIATION
    )


def _applies(item):
    if _is_emulated(item) and _is_of_the_battery(item) and item.originalname not in EMULATED:
        return False
    marker = item.get_closest_marker("applies")
    return marker is None or marker.args[0](item.cls.op, item.callspec.params["backend"])


def pytest_generate_tests(metafunc):
    """A test that takes ``backend`` runs once on each back end under test."""
    if "backend" in metafunc.fixturenames:
        told = metafunc.config.backends
        its = [name for name in told if name in getattr(metafunc.cls, "backends", told)]
        metafunc.parametrize("backend", its, indirect=True)
    if "compiled" in metafunc.fixturenames:
        compiled = [name for name in metafunc.config.backends if name != "torch"]
        metafunc.parametrize("compiled", compiled, indirect=True)


@pytest.fixture
def backend(request):
    """The back end's name, asked for explicitly: a silent fallback cannot pass for it."""
    with _asked(request.param):
        yield request.param


@pytest.fixture
def compiled(request):
    with _asked(request.param):
        yield request.param


def _asked(name):
    emulated = name == cuda_emulator.NAME
    cuda_emulator.select(emulated)
    return ops.use_backend("cpp" if emulated else name)


@pytest.fixture
def device(request):
    """Where the tensors of the back end under test live."""
    name = "backend" if "backend" in request.fixturenames else "compiled"
    return torch.device(DEVICES[request.getfixturevalue(name)])


@pytest.fixture(autouse=True)
def cache_stays():
    """No test leaves the cache of another behind."""
    yield
    assert os.environ["JITOPS_CACHE_DIR"] == _CACHE


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_op_stays(monkeypatch):
    """The ops that a test makes are known to no other test."""
    dispatch.known()  # the built-in ones stay
    monkeypatch.setattr(dispatch, "_ops", dict(dispatch._ops))


@pytest.fixture
def process_group():
    """The default group of torch.distributed, with this process alone."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def root():
    """The repository."""
    return Path(__file__).resolve().parent.parent


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
