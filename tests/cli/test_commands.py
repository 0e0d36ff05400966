"""The command ``jitops``: its output and its exit status."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import ops
from ops import _config
from ops._cli import main as cli
from ops._core import extensions
from ops.jit import load_inline
from ops.jit._compile import _compilers
from tests.harness import helpers
from tests.harness.forks import command
from tests.harness.helpers import environment
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
    """Run the command and return its output."""
    assert cli.main(arguments) == status
    return capsys.readouterr().out


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
@pytest.mark.parametrize("file", ["nowhere/x.json", "folder", "file/x.json"])
def test_nowhere_to_write_compile_commands_to_is_said_first(cache, tmp_path, capsys, file):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    file = tmp_path / file
    assert cli.main(["build", OP, "--backend=cpp", f"--compile-commands={file}"]) == 1
    said = capsys.readouterr()
    assert "--compile-commands must be a file in a writable folder, got" in said.err
    assert said.out == ""
    assert entries(cache) == []


@pytest.mark.thorough
@pytest.mark.cpp
def test_build_for_other_machines(cache, capsys):
    levels = ["--cpu=baseline", "--cpu=x86-64-v3"]
    assert "2 of 2" in said(capsys, "build", OP, "--backend=cpp", *levels)
    assert len(entries(cache)) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build", "nothing"], "OP must be among "),
        (
            ["cache", "why", "nothing"],
            "NAME must be an op, or the start of an extension's name or of",
        ),
        (["cache", "clean", "--max-size="], "--max-size must be a size like 500M or 2G, got ''"),
        (["cache", "clean", "--max-size=much"], "--max-size must be a size like 500M or 2G"),
        (["bundle", "verify", "/no/such/file"], "/no/such/file"),
        (["bundle", "import", "/no/such/file"], "/no/such/file"),
        (["bundle", "export", "/tmp/x.zip", "--extension=none"], "named 'none': build it first"),
        (["build", "--arch=9.9x", "--backend=cuda", OP], "jitops: "),
        (["build", "--arch=9.9x", OP], "jitops: "),
    ],
)
def test_bad_requests(cache, capsys, arguments, message):
    assert cli.main(arguments) == 1
    assert message in capsys.readouterr().err


def test_what_is_left_out_is_said_unless_it_was_asked_for(cache, capsys, monkeypatch):
    def check_cuda():
        raise ops.ToolchainError("no nvcc here")

    monkeypatch.setattr(_compilers, "check_cuda", check_cuda)
    assert cli.main(["cache", "why", OP]) == 0
    assert capsys.readouterr().err == "jitops: skipping CUDA: no nvcc here\n"
    for asked in ("--arch=9.0", "--backend=cuda"):
        assert cli.main(["cache", "why", OP, asked]) == 1
        assert capsys.readouterr().err == "jitops: no nvcc here\n"


@pytest.mark.parametrize(
    "arguments",
    [["build", "--jobs=0"], ["build", "--jobs=many"], ["cache", "clean", "--unused-for=x"]]
    + [["cache", "clean", f"--unused-for={days}"] for days in ("-1", "nan", "inf")],
)
def test_bad_usage(arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2


@pytest.mark.parametrize("group", [[], ["cache"], ["bundle"]])
def test_a_command_without_its_action_prints_its_help(group, capsys):
    out = said(capsys, *group, status=2)
    assert out.startswith(f"usage: {' '.join(['jitops', *group])} [-h]")
    assert "verify" in out or "doctor" in out


# ---- cache


def test_an_empty_cache(cache, capsys):
    assert said(capsys, "cache", "ls") == f"{cache} is empty\n"
    assert said(capsys, "cache", "ls", "--json") == "[]\n"
    assert said(capsys, "cache", "verify") == "0 entries checked, 0 damaged\n"
    assert said(capsys, "cache", "clean").startswith("0 entries deleted")
    assert "the cache has no entry named x" in said(capsys, "cache", "info", "x", status=1)


@pytest.mark.cpp
def test_what_is_in_the_cache(full, capsys):
    (folder,) = entries(full)
    listed = said(capsys, "cache", "ls")
    assert "answer" in listed
    assert listed.splitlines()[-1].startswith("1 entry, ")
    (item,) = json.loads(said(capsys, "cache", "ls", "--json"))
    assert item["folder"] == str(folder)
    assert item["loads"] == 1
    assert item["size"] >= (folder / "answer.so").stat().st_size
    (digest,) = {word for word in listed.split() if folder.parent.name.startswith(f"answer-{word}")}
    (told,) = json.loads(said(capsys, "cache", "info", digest, "--json"))
    assert told["manifest"]["name"] == "answer"
    assert said(capsys, "cache", "verify") == "1 entry checked, 0 damaged\n"


@pytest.mark.cpp
def test_info_in_words(full, capsys):
    said(capsys, "build", OP, "--backend=cpp", "--cpu=x86-64-v3")
    words = said(capsys, "cache", "info", "answer", OP)
    assert len(words.splitlines()) <= 24
    for (name, source, target), folder in zip(
        (("answer", "text", "any x86_64 CPU"), (f"jitops_{OP}_cpp", f"{OP}.cpp", "x86-64-v3")),
        sorted(entries(full)),
        strict=True,
    ):
        told = words[words.index(name) :]
        assert f"  library   {folder / name}.so\n" in told
        assert f"  sources   {source}; " in told
        assert f"  for       {target}\n" in told
    manifest = entries(full)[0] / "manifest.json"
    manifest.chmod(0o600)
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "request": {}}))
    assert "library" in said(capsys, "cache", "info", "answer", OP)  # of a later version, say


@pytest.mark.cpp
def test_why(cache, capsys):
    why = ["cache", "why", OP, "--backend=cpp"]
    assert "nothing" in said(capsys, *why)
    said(capsys, "build", OP, "--backend=cpp", "--cpu=baseline")
    told = json.loads(said(capsys, *why, "--json"))
    assert "-march=" in told[f"jitops_{OP}_cpp"]
    assert "is in the cache: " in said(capsys, *why, "--cpu=baseline")


@pytest.mark.cpp
def test_info_and_why_take_the_same_names(full, capsys, monkeypatch):
    """Names are an op, the start of an extension or digest, or a folder of the cache."""
    said(capsys, "build", OP, "--backend=cpp")
    monkeypatch.setattr("torch.__version__", "9.9.9")
    for name, op in (("answer", False), (f"jitops_{OP}_cpp", True)):
        (listed,) = json.loads(said(capsys, "cache", "info", name, "--json"))
        folder = "/".join(listed["folder"].split("/")[-2:])
        digest = listed["manifest"]["digest"]
        starts = [name, digest[:4], digest, folder, folder.split("/")[0]]
        for start in [*starts, *([OP] if op else [name[:3]])]:
            (same,) = json.loads(said(capsys, "cache", "info", start, "--json"))
            assert same == listed
            told = json.loads(said(capsys, "cache", "why", start, "--json"))
            told.pop(f"jitops_{OP}_cuda", None)  # with CUDA the op has another extension
            ((place, difference),) = told.items()
            assert place == (name if op and start in (OP, name) else folder)
            assert difference.startswith("torch: ")
            assert "9.9.9" in difference


@pytest.mark.cpp
def test_why_of_an_extension_that_is_no_ops(full, capsys, monkeypatch):
    assert "this machine has not changed" in said(capsys, "cache", "why", "answer")
    monkeypatch.setenv("CXX", "g++ -m32")
    assert "cxx_arguments: none → -m32" in said(capsys, "cache", "why", "answer")
    monkeypatch.delenv("CXX")
    (folder,) = entries(full)
    manifest = folder / "manifest.json"
    manifest.chmod(0o600)
    told = json.loads(manifest.read_text())
    told["compilers"]["cxx"] = {"version": "gcc version 1", "identity": "another"}
    manifest.write_text(json.dumps(told))
    assert "cxx: gcc version 1 → " in said(capsys, "cache", "why", "answer")
    manifest.write_text(json.dumps({**told, "request": {"format": told["request"]["format"]}}))
    assert "its manifest cannot be read" in said(capsys, "cache", "why", "answer")


@pytest.mark.cpp
def test_damage_is_told(full, capsys):
    (folder,) = entries(full)
    library = folder / "answer.so"
    content = bytearray(library.read_bytes())
    content[-1] ^= 1
    library.unlink()  # this process has the library loaded
    library.write_bytes(content)
    assert f"damaged: {folder}" in said(capsys, "cache", "verify", status=1)
    told = json.loads(said(capsys, "cache", "verify", "--json", status=1))
    assert told == {"checked": 1, "damaged": [str(folder)]}


@pytest.mark.cpp
def test_clean_spares_what_is_in_use(full, capsys):
    assert said(capsys, "cache", "clean").endswith("1 left\n")
    command("build", OP, "--backend=cpp", JITOPS_CACHE_DIR=full)
    assert "0 entries" in said(capsys, "cache", "clean", "--unused-for=1")
    assert "0 entries" in said(capsys, "cache", "clean", "lltm")
    assert cli.main(["cache", "clean", "other"]) == 1
    assert "NAME must be an op, or the start of" in capsys.readouterr().err
    (gone,) = json.loads(said(capsys, "cache", "clean", OP, "--json"))
    assert gone["name"] == f"jitops_{OP}_cpp"
    assert len(entries(full)) == 1
    assert said(capsys, "cache", "clean", "--max-size=1K").endswith("1 left\n")


# ---- bundle


@pytest.mark.cpp
def test_bundle(full, tmp_path, settings, capsys):
    archive = tmp_path / "bundle.zip"
    options = [OP, "--extension=answer", "--backend=cpp"]
    out = said(capsys, "bundle", "export", str(archive), *options)
    level = extensions.cpu_level()
    of_op = "any x86_64 CPU" if level == "baseline" else level
    assert out.splitlines() == [
        f"{archive}: 2 entries",
        "  answer for any x86_64 CPU",
        f"  jitops_{OP}_cpp for {of_op}",
    ]
    verified = said(capsys, "bundle", "verify", str(archive))
    assert verified == "2 entries checked, 0 damaged\n"
    other = tmp_path / "other"
    settings(CACHE_DIR=str(other), BUILD="never")
    assert said(capsys, "bundle", "import", str(archive)).endswith("2 new entries\n")
    assert said(capsys, "bundle", "import", str(archive)).endswith("0 new entries\n")
    with ops.use_backend("cpp"):
        assert _config.settings().build == "never"
        assert "is in the cache" in said(capsys, "cache", "why", OP, "--backend=cpp")


# ---- demo


@pytest.mark.thorough
@pytest.mark.cpp
def test_the_demo_says_what_it_does_before_it_is_done(tmp_path):
    """A slow step is announced before it starts, even if stdout is a pipe."""
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    picture = tmp_path / "picture.png"
    command = [sys.executable, "-m", "ops", "demo", "--steps=2", f"--output={picture}"]
    variables = environment(JITOPS_CACHE_DIR=tmp_path / "cache")
    process = subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True)
    seen = ""
    try:
        for announced in (
            "Importing torch",
            "Back end cpp:",
            "not in the cache: compiling ...",
            "new processes, each of which imports torch first ...",
            "Training: 1200 handwritten digits",
            "  cpp    2 steps ...",
        ):
            while announced not in seen:
                letter = process.stdout.read(1)
                assert letter, seen
                seen += letter
            assert not picture.exists()  # the demo saves it last
        rest = process.stdout.read()
        assert process.wait() == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert f"Picture of the embedding before and after: {picture}" in rest
    assert picture.exists()


# ---- failing output


def test_a_terminal_without_arrows(tmp_path):
    settings = {"PYTHONIOENCODING": "ascii", "JITOPS_CACHE_DIR": tmp_path / "cache"}
    code, out, _ = helpers.command("doctor", **settings)
    assert code == 0
    assert out.isascii()


@pytest.mark.thorough
def test_output_that_nobody_reads():
    """It returns a status without a traceback, and Python prints none when it exits."""
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
