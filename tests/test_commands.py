"""The command ``jitops``: what it says, and its exit status."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

import ops
from ops import _config, _op, cli
from ops.jit import load_inline
from tests.helpers import environment, path_without
from tests.jit.support import ANSWER, entries

PLAIN = {"is_python_module": False, "no_implicit_headers": True}
COMPILERS = ("c++", "g++", "clang++", "cc", "gcc", "clang")
OP = "improved_triplet_loss"


@pytest.fixture
def cache(tmp_path, settings):
    """An empty cache."""
    folder = tmp_path / "cache"
    folder.mkdir()
    settings(CACHE_DIR=str(folder))
    return folder


@pytest.fixture
def full(cache):
    """A cache with one extension."""
    load_inline("answer", ANSWER, **PLAIN)
    return cache


def said(capsys, *arguments, status=0):
    """What the command prints."""
    assert cli.main(arguments) == status
    return capsys.readouterr().out


def process(*arguments, **changes):
    """The command in a process of its own: status, output, errors."""
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


# ---- doctor


def report(*, status=0, **changes):
    """The doctor's findings by section and topic, and what it says in words."""
    code, out, err = process("doctor", "--json", **changes)
    assert code == status, err
    told = json.loads(out)
    in_words = process("doctor", **changes)
    assert in_words[0] == status
    found = {
        (section, one["topic"]): one
        for section, findings in told.items()
        if isinstance(findings, list)
        for one in findings
    }
    return found, told["verdict"], " ".join(in_words[1].split())


def test_doctor_here(tmp_path):
    found, verdict, words = report(JITOPS_CACHE_DIR=tmp_path / "cache")
    assert found["machine", "torch"]["found"].startswith(__import__("torch").__version__)
    for topic in ("jitops", "python", "GPUs", "resources", "instruction set"):
        assert ("machine", topic) in found
    for topic in ("cache", "its disk", "its locks", "in it"):
        assert found["cache", topic]["status"] in ("ok", "note")
    assert found["variables", "JITOPS_CACHE_DIR"]["found"] == str(tmp_path / "cache")
    assert {(f"{name} {backend}") for name in _op.known() for backend in ("cpp", "cuda")} == {
        topic for section, topic in found if section == "ops"
    }
    assert "pure-torch path" in verdict
    assert verdict in words


@pytest.mark.cpp
def test_doctor_of_what_is_built_and_what_would_be(full, tmp_path):
    found, verdict, words = report(JITOPS_CACHE_DIR=full, JITOPS_BACKEND="cpp")
    assert "would be built: " in found["ops", f"{OP} cpp"]["found"]
    assert verdict == "Back end cpp: works."
    process("build", OP, "--backend=cpp", JITOPS_CACHE_DIR=full)
    found, _, words = report(JITOPS_CACHE_DIR=full, JITOPS_BACKEND="cpp")
    assert found["ops", f"{OP} cpp"]["found"].startswith(f"cached: {full}")
    assert "would be built" in words  # the other ones


def test_doctor_without_a_compiler(tmp_path):
    path = path_without(*COMPILERS, folder=tmp_path / "bin")
    changes = {"PATH": path, "CXX": None, "JITOPS_CACHE_DIR": tmp_path / "cache"}
    found, verdict, words = report(**changes, JITOPS_BACKEND="cpp", status=1)
    compiler = found["tools", "C++ compiler"]
    assert (compiler["found"], compiler["status"]) == ("none found", "problem")
    assert "apt install g++" in compiler["fix"]
    assert compiler["fix"] in words
    assert f"does NOT work for {OP}" in verdict
    if torch.version.cuda is None:  # a compiler would not help
        assert "built without CUDA" in found["ops", f"{OP} cuda"]["fix"]
    _, verdict, _ = report(**changes)
    assert "works" in verdict  # what is asked for is the pure-torch path


def test_doctor_with_a_compiler_that_is_named_and_missing(tmp_path):
    found, _, _ = report(CXX="/no/such/g++", JITOPS_CACHE_DIR=tmp_path / "cache")
    assert "'/no/such/g++', which is not found" in found["tools", "C++ compiler"]["found"]


def test_doctor_with_a_compiler_that_does_not_work(tmp_path):
    broken = tmp_path / "g++"
    broken.write_text('#!/bin/sh\n[ "$1" = -v ] && exec c++ -v\necho out of order >&2\nexit 1\n')
    broken.chmod(0o755)
    found, _, _ = report(CXX=broken, JITOPS_CACHE_DIR=tmp_path / "cache")
    assert "out of order" in found["tools", "compiling"]["found"]


def test_doctor_without_ninja(tmp_path):
    """Neither its package nor its program."""
    path = path_without("ninja", folder=tmp_path / "bin")
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "ninja.py").write_text("raise ImportError('hidden')\n")
    found, verdict, words = report(
        PATH=path,
        PYTHONPATH=f"{tmp_path / 'hidden'}{os.pathsep}{environment()['PYTHONPATH']}",
        JITOPS_CACHE_DIR=tmp_path / "cache",
        JITOPS_BACKEND="cpp",
        status=1,
    )
    assert found["tools", "ninja"]["found"] == "not found"
    assert "pip install ninja" in words
    assert "does NOT work" in verdict


@pytest.mark.parametrize("where", ["TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME", "HOME"])
def test_doctor_with_a_stale_lock_of_torchs(tmp_path, where):
    """Torch's own loader would wait for it for ever."""
    below = {
        "TORCH_EXTENSIONS_DIR": "",
        "XDG_CACHE_HOME": "torch_extensions/py311_cpu",
        "HOME": ".cache/torch_extensions/py311_cpu",
    }[where]
    lock = tmp_path / below / "mine" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    changes = {"TORCH_EXTENSIONS_DIR": None, "XDG_CACHE_HOME": None, where: tmp_path}
    found, _, words = report(**changes, JITOPS_CACHE_DIR=tmp_path / "cache")
    assert str(lock) in found["cache", "torch's own lock"]["found"]
    assert f"rm {lock}" in words.replace("\n", "")


def test_doctor_with_an_unusable_cache(tmp_path):
    (tmp_path / "file").touch()
    found, _, words = report(JITOPS_CACHE_DIR=tmp_path / "file", TMPDIR=tmp_path)
    assert found["cache", "cache"]["status"] == "note"
    assert "is used instead; set JITOPS_CACHE_DIR" in words


@pytest.mark.cpp
def test_doctor_of_a_build_that_failed(tmp_path, root):
    """What has failed is told without trying again."""
    sources = tmp_path / "checkout"
    shutil.copytree(root / "ops", sources / "ops", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(root / "cuda_src", sources / "cuda_src")
    (sources / "cuda_src" / f"{OP}.cpp").write_text("this is no C++;\n")
    changes = {
        "PYTHONPATH": sources,
        "JITOPS_CACHE_DIR": tmp_path / "cache",
        "JITOPS_BACKEND": "cpp",
    }
    code, out, _ = process("build", OP, "--backend=cpp", **changes)
    assert code == 1
    assert f"{OP}.cpp:1" in out
    found, _, words = report(**changes, status=1)
    assert found["ops", f"{OP} cpp"]["status"] == "problem"
    assert f"{OP}.cpp:1" in words


# ---- build


@pytest.mark.cpp
def test_build(cache, tmp_path, capsys):
    out = said(capsys, "build", OP, "--backend=cpp", "--jobs=1")
    assert out.startswith("1 of 1 built or in the cache")
    (folder,) = entries(cache)
    editors = tmp_path / "compile_commands.json"
    said(capsys, "build", OP, "--backend=cpp", f"--compile-commands={editors}")
    files = {command["file"] for command in json.loads(editors.read_text())}
    assert any(file.endswith(f"cuda_src/{OP}.cpp") for file in files)
    assert entries(cache) == [folder]


@pytest.mark.cpp
def test_build_for_other_machines(cache, capsys):
    levels = ["--cpu=baseline", "--cpu=x86-64-v3"]
    assert "2 of 2" in said(capsys, "build", OP, "--backend=cpp", *levels)
    assert len(entries(cache)) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build", "nothing"], f"OP must be among {OP}"),
        (["cache", "why", "nothing"], "OP must be among"),
        (["cache", "clean", "--max-size="], "--max-size must be a size like 500M or 2G, got ''"),
        (["cache", "clean", "--max-size=much"], "--max-size must be a size like 500M or 2G"),
        (["bundle", "verify", "/no/such/file"], "/no/such/file"),
        (["bundle", "import", "/no/such/file"], "/no/such/file"),
        (["bundle", "export", "/tmp/x.zip", "--extension=none"], "called 'none': build it first"),
        (["build", "--arch=9.9x", "--backend=cuda", OP], "jitops: "),
    ],
)
def test_bad_requests(cache, capsys, arguments, message):
    assert cli.main(arguments) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [["build", "--jobs=0"], ["build", "--jobs=many"], ["cache", "clean", "--unused-for=x"], []]
    + [["cache", "clean", f"--unused-for={days}"] for days in ("-1", "nan", "inf")],
)
def test_bad_usage(arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2


# ---- cache


def test_an_empty_cache(cache, capsys):
    assert said(capsys, "cache", "ls") == f"{cache} holds nothing yet\n"
    assert said(capsys, "cache", "ls", "--json") == "[]\n"
    assert said(capsys, "cache", "verify") == "0 damaged\n"
    assert said(capsys, "cache", "clean").startswith("0 entries deleted")
    assert "nothing in the cache is called x" in said(capsys, "cache", "info", "x", status=1)


@pytest.mark.cpp
def test_what_is_in_the_cache(full, capsys):
    (folder,) = entries(full)
    listed = said(capsys, "cache", "ls")
    assert "answer" in listed
    assert "1 entries" in listed
    (item,) = json.loads(said(capsys, "cache", "ls", "--json"))
    assert item["folder"] == str(folder)
    assert item["loads"] == 1
    assert item["size"] >= (folder / "answer.so").stat().st_size
    assert json.loads(said(capsys, "cache", "info", "ans"))["manifest"]["name"] == "answer"


@pytest.mark.cpp
def test_why(cache, capsys):
    why = ["cache", "why", OP, "--backend=cpp"]
    assert "nothing" in said(capsys, *why)
    said(capsys, "build", OP, "--backend=cpp", "--cpu=baseline")
    told = json.loads(said(capsys, *why, "--json"))
    assert "-march=" in told[f"jitops_{OP}_cpp"]
    assert "is in the cache: " in said(capsys, *why, "--cpu=baseline")


@pytest.mark.cpp
def test_damage_is_told(full, capsys):
    (folder,) = entries(full)
    library = folder / "answer.so"
    content = bytearray(library.read_bytes())
    content[-1] ^= 1
    library.unlink()  # this process has it loaded
    library.write_bytes(content)
    assert f"damaged: {folder}" in said(capsys, "cache", "verify", status=1)
    told = json.loads(said(capsys, "cache", "verify", "--json", status=1))
    assert told == {"damaged": [str(folder)]}


@pytest.mark.cpp
def test_clean_spares_what_is_in_use(full, capsys):
    assert said(capsys, "cache", "clean").endswith("1 left\n")
    process("build", OP, "--backend=cpp", JITOPS_CACHE_DIR=full)
    assert "0 entries" in said(capsys, "cache", "clean", "--unused-for=1")
    assert "0 entries" in said(capsys, "cache", "clean", "other")
    (gone,) = json.loads(said(capsys, "cache", "clean", "--json"))
    assert gone["name"] == f"jitops_{OP}_cpp"
    assert len(entries(full)) == 1
    assert said(capsys, "cache", "clean", "--max-size=1K").endswith("1 left\n")


# ---- bundle


@pytest.mark.cpp
def test_bundle(full, tmp_path, settings, capsys):
    archive = tmp_path / "bundle.zip"
    options = [OP, "--extension=answer", "--backend=cpp"]
    out = said(capsys, "bundle", "export", str(archive), *options)
    assert out == f"{archive}: answer, jitops_{OP}_cpp\n"
    assert "are whole" in said(capsys, "bundle", "verify", str(archive))
    other = tmp_path / "other"
    settings(CACHE_DIR=str(other), BUILD="never")
    assert said(capsys, "bundle", "import", str(archive)).endswith("2 new entries\n")
    assert said(capsys, "bundle", "import", str(archive)).endswith("0 new entries\n")
    with ops.use_backend("cpp"):
        assert _config.settings().build == "never"
        assert "is in the cache" in said(capsys, "cache", "why", OP, "--backend=cpp")


# ---- output that cannot be written


def test_a_terminal_without_arrows(tmp_path):
    code, out, _ = process("doctor", PYTHONIOENCODING="ascii", JITOPS_CACHE_DIR=tmp_path / "cache")
    assert code == 0
    assert out.isascii()


def test_output_that_nobody_reads():
    """A status, and no traceback: neither from the command nor from Python as it ends."""
    for target, status in ((">/dev/full", 1), (">&-", 0)):
        done = subprocess.run(
            ["sh", "-c", f'"$0" -m ops explain {target}', sys.executable],
            env=environment(),
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        assert done.returncode == status
        assert "Traceback" not in done.stderr
        assert "Exception ignored" not in done.stderr
        assert ("No space left" in done.stderr) is (target == ">/dev/full")
