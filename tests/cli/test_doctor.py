"""``jitops doctor``: its findings, its advice and its exit status."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch

from ops._core import dispatch
from tests.harness import helpers
from tests.harness.forks import command
from tests.harness.helpers import environment, path_without

COMPILERS = ("c++", "g++", "clang++", "cc", "gcc", "clang")
OP = "improved_triplet_loss"


def report(*, status=0, command=command, **changes):
    """The findings by section and topic, and the verdict."""
    code, out, err = command("doctor", "--json", **changes)
    assert code == status, err
    told = json.loads(out)
    found = {
        (section, one["topic"]): one
        for section, findings in told.items()
        if isinstance(findings, list)
        for one in findings
    }
    return found, told["verdict"]


def report_and_words(*, status=0, command=command, **changes):
    """As :func:`report`, and the printed report."""
    code, out, _ = command("doctor", **changes)
    assert code == status
    return *report(status=status, command=command, **changes), " ".join(out.split())


def test_doctor_here(tmp_path):
    found, verdict, words = report_and_words(JITOPS_CACHE_DIR=tmp_path / "cache")
    assert found["machine", "torch"]["found"].startswith(torch.__version__)
    for topic in ("jitops", "python", "GPUs", "resources", "instruction set"):
        assert ("machine", topic) in found
    for topic in ("cache", "its disk", "its locks", "in it"):
        assert found["cache", topic]["status"] in ("ok", "note")
    assert found["variables", "JITOPS_CACHE_DIR"]["found"] == str(tmp_path / "cache")
    assert {(f"{name} {backend}") for name in dispatch.known() for backend in ("cpp", "cuda")} == {
        topic for section, topic in found if section == "ops"
    }
    assert "pure-torch path" in verdict
    assert verdict in words


@pytest.mark.thorough
@pytest.mark.cpp
def test_doctor_of_what_is_built_and_what_would_be(tmp_path):
    full = tmp_path / "cache"
    found, verdict = report(JITOPS_CACHE_DIR=full, JITOPS_BACKEND="cpp")
    assert "would be built: " in found["ops", f"{OP} cpp"]["found"]
    assert verdict == "Back end cpp: works."
    if not torch.cuda.is_available():
        _, verdict = report(JITOPS_CACHE_DIR=full, JITOPS_BACKEND="compiled")
        assert verdict == "Back end compiled: works."
    command("build", OP, "--backend=cpp", JITOPS_CACHE_DIR=full)
    found, _, words = report_and_words(JITOPS_CACHE_DIR=full, JITOPS_BACKEND="cpp")
    assert found["ops", f"{OP} cpp"]["found"].startswith(f"cached: {full}")
    assert "would be built" in words  # the ops that are not built


@pytest.mark.thorough
def test_doctor_without_a_compiler(tmp_path):
    path = path_without(*COMPILERS, folder=tmp_path / "bin")
    changes = {"PATH": path, "CXX": None, "JITOPS_CACHE_DIR": tmp_path / "cache"}
    found, verdict, words = report_and_words(**changes, JITOPS_BACKEND="cpp", status=1)
    compiler = found["tools", "C++ compiler"]
    assert (compiler["found"], compiler["status"]) == ("none found", "problem")
    assert "apt install g++" in compiler["fix"]
    assert compiler["fix"] in words
    assert "does NOT work for " in verdict
    assert f"{OP} cpp" in verdict
    if torch.version.cuda is None:  # a compiler alone does not help
        assert "built without CUDA" in found["ops", f"{OP} cuda"]["fix"]
    _, verdict = report(**changes)
    assert "works" in verdict  # the requested back end is pure torch
    _, verdict = report(**changes, JITOPS_BACKEND="compiled")
    assert verdict.startswith("Back end compiled: works, on the pure-torch path because it lacks ")
    assert f"{OP} cpp" in verdict
    _, verdict = report(**changes, JITOPS_BACKEND="compiled", JITOPS_STRICT="1", status=1)
    assert verdict.startswith("Back end compiled: does NOT work for ")


@pytest.mark.thorough
@pytest.mark.cpp
@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ({"JITOPS_BUILD": "never"}, f"jitops_{OP}_cpp is not built yet, and JITOPS_BUILD=never"),
        ({"JITOPS_SANITIZE": "thread"}, "needs the sanitizer's runtime in the process"),
    ],
)
def test_doctor_applies_the_settings_that_a_call_does(tmp_path, setting, reason):
    changes = {"JITOPS_CACHE_DIR": tmp_path / "cache", **setting}
    found, verdict, words = report_and_words(**changes, JITOPS_BACKEND="cpp", status=1)
    finding = found["ops", f"{OP} cpp"]
    assert finding["found"] == "cannot run"
    assert reason in finding["fix"]
    assert "would be built" not in words
    assert verdict.startswith("Back end cpp: does NOT work for ")


@pytest.mark.thorough
def test_doctor_with_a_compiler_that_is_named_and_missing(tmp_path):
    found, _ = report(CXX="/no/such/g++", JITOPS_CACHE_DIR=tmp_path / "cache")
    assert "'/no/such/g++', which is not found" in found["tools", "C++ compiler"]["found"]


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("variable", "topic"),
    [
        ("CXX", "C++ compiler"),
        ("PYTORCH_NVCC", "nvcc"),
        ("CC", "CC"),
        ("NVCC_PREPEND_FLAGS", "NVCC_PREPEND_FLAGS"),
        ("NVCC_APPEND_FLAGS", "NVCC_APPEND_FLAGS"),
    ],
)
def test_doctor_with_a_quote_that_does_not_close(tmp_path, variable, topic):
    found, _, words = report_and_words(**{variable: "g++ 'x"}, JITOPS_CACHE_DIR=tmp_path / "cache")
    finding = found["tools", topic]
    assert finding["status"] == ("problem" if variable == "CXX" or torch.version.cuda else "note")
    assert f"${variable} must be words with balanced quotes" in finding["found"]
    assert 'got "g++ \'x", which is no command: No closing quotation' in finding["found"]
    assert finding["fix"] == "close its quotes, or unset it"
    assert "→ close its quotes, or unset it" in words


@pytest.mark.thorough
def test_doctor_with_a_compiler_that_does_not_work(tmp_path):
    broken = tmp_path / "g++"
    broken.write_text('#!/bin/sh\n[ "$1" = -v ] && exec c++ -v\necho out of order >&2\nexit 1\n')
    broken.chmod(0o755)
    found, _ = report(CXX=broken, JITOPS_CACHE_DIR=tmp_path / "cache")
    assert "out of order" in found["tools", "compiling"]["found"]
    changes = {"CXX": broken, "JITOPS_CACHE_DIR": tmp_path / "cache"}
    found, verdict = report(**changes, JITOPS_BACKEND="cpp", status=1)
    assert found["ops", f"{OP} cpp"]["fix"] == "see compiling, above"
    assert "does NOT work" in verdict


def test_doctor_without_ninja(tmp_path):
    """ninja is neither in this environment nor on PATH."""
    path = path_without("ninja", folder=tmp_path / "bin")
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "sitecustomize.py").write_text(
        "import os\nreal = os.access\n"
        "os.access = lambda path, mode: not str(path).endswith('/ninja') and real(path, mode)\n"
    )
    found, verdict, words = report_and_words(
        command=helpers.command,
        PATH=path,
        PYTHONPATH=f"{tmp_path / 'hidden'}{os.pathsep}{environment()['PYTHONPATH']}",
        JITOPS_CACHE_DIR=tmp_path / "cache",
        JITOPS_BACKEND="cpp",
        status=1,
    )
    assert found["tools", "ninja"]["found"] == "not found"
    assert "pip install ninja" in words
    assert "does NOT work" in verdict


@pytest.mark.thorough
@pytest.mark.parametrize("where", ["TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME", "HOME"])
def test_doctor_with_a_stale_lock_of_torchs(tmp_path, where):
    """The doctor finds the lock, because torch's own loader waits for it forever."""
    below = {
        "TORCH_EXTENSIONS_DIR": "",
        "XDG_CACHE_HOME": "torch_extensions/py311_cpu",
        "HOME": ".cache/torch_extensions/py311_cpu",
    }[where]
    lock = tmp_path / below / "mine" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    changes = {"TORCH_EXTENSIONS_DIR": None, "XDG_CACHE_HOME": None, where: tmp_path}
    found, _, words = report_and_words(**changes, JITOPS_CACHE_DIR=tmp_path / "cache")
    assert str(lock) in found["cache", "torch's own lock"]["found"]
    assert f"rm {lock}" in words.replace("\n", "")


@pytest.mark.thorough
def test_doctor_with_an_unusable_cache(tmp_path):
    (tmp_path / "file").touch()
    found, _, words = report_and_words(JITOPS_CACHE_DIR=tmp_path / "file", TMPDIR=tmp_path)
    assert found["cache", "cache"]["status"] == "note"
    assert "is used instead; set JITOPS_CACHE_DIR" in words


@pytest.mark.thorough
@pytest.mark.cpp
def test_doctor_of_a_build_that_failed(tmp_path, root):
    """It reports the last failure without another build."""
    sources = tmp_path / "checkout"
    shutil.copytree(root / "ops", sources / "ops", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(root / "cuda_src", sources / "cuda_src")
    (sources / "cuda_src" / f"{OP}.cpp").write_text("this is no C++;\n")
    changes = {
        "PYTHONPATH": sources,
        "JITOPS_CACHE_DIR": tmp_path / "cache",
        "JITOPS_BACKEND": "cpp",
    }
    code, out, _ = helpers.command("build", OP, "--backend=cpp", **changes)
    assert code == 1
    assert f"{OP}.cpp:1" in out
    found, _ = report(**changes, command=helpers.command, status=1)
    assert found["ops", f"{OP} cpp"]["status"] == "problem"
    assert f"{OP}.cpp:1" in str(found["ops", f"{OP} cpp"])
