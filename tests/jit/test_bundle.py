"""Bundles: what is built here runs there, without compiler, ninja or cache."""

from __future__ import annotations

import json
import os
import re
import shutil
import zipfile
from pathlib import Path

import pytest

import ops
from ops._cli import main as cli
from ops.jit import load, load_inline
from ops.jit._cache import _bundle, _eviction
from tests.harness.forks import run
from tests.jit.support import ANSWER, answer, entries
from tests.jit.test_drop_in import OPERATORS, STABLE

pytestmark = pytest.mark.cpp

PLAIN = {"is_python_module": False, "no_implicit_headers": True}
USE = f"""
    import ctypes, shutil, sys, ops.jit
    assert shutil.which("c++") is None and shutil.which("ninja") is None
    path = ops.jit.load_inline("answer", {ANSWER!r}, **{PLAIN})
    print(ctypes.CDLL(path).answer(), "ops.jit._compile._build" in sys.modules)
"""
LOSS = """
    import torch, ops
    with ops.use_backend("cpp"):
        x = torch.ones(2, 3, requires_grad=True)
        ops.improved_triplet_loss(x, x, x, -1.0, 0.0, 1.0).backward()
    print("ran")
"""


@pytest.fixture
def bundle(cache, tmp_path):
    """A bundle of one extension, whose cache is no longer there."""
    load_inline("answer", ANSWER, **PLAIN)
    path = tmp_path / "bundle.zip"
    _bundle.export(path, [item.entry for item in _eviction.items(cache)])
    shutil.move(cache, tmp_path / "elsewhere")
    cache.mkdir()
    return path


def nothing(tmp_path, cache):
    """An environment without compiler, ninja or anything else on PATH."""
    (tmp_path / "empty").mkdir(exist_ok=True)
    return {"PATH": tmp_path / "empty", "JITOPS_CACHE_DIR": cache, "JITOPS_BUILD": "never"}


def test_used_in_place(bundle, cache, tmp_path):
    out, _ = run(USE, **nothing(tmp_path, cache), JITOPS_BUNDLE=bundle)
    assert out.split() == ["42", "False"]
    assert entries(cache) == []


def test_used_in_place_unpacked_and_read_only(bundle, cache, tmp_path):
    folder = tmp_path / "unpacked"
    zipfile.ZipFile(bundle).extractall(folder)
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o555)
    out, _ = run(USE, **nothing(tmp_path, cache), JITOPS_BUNDLE=folder)
    assert out.split() == ["42", "False"]


def test_what_is_used_in_place_is_named(bundle, cache, settings, tmp_path, capsys):
    """By a path that leads there; and what lies beside it is found."""
    settings(BUNDLE=str(bundle), CACHE_DIR=str(cache), PROGRESS="1")
    text = ops.jit.text("answer", ANSWER, **PLAIN)
    assert text.find().is_relative_to(cache / "bundles")
    ops.Op("of_bundle", cpp=text)
    assert f"built: {text.find()}" in str(ops.explain("of_bundle"))
    folder = tmp_path / "folder"
    path = load_inline("answer", ANSWER, verbose=True, build_directory=folder, **PLAIN)
    assert f"is in the cache: {text.find()}" in capsys.readouterr().err
    assert answer(path) == answer(folder / "answer.so") == 42


def test_exported_from_what_is_used_in_place(bundle, cache, settings, tmp_path):
    settings(BUNDLE=str(bundle), CACHE_DIR=str(cache))
    entry = ops.jit.text("answer", ANSWER, **PLAIN).build_entry()
    again = tmp_path / "again.zip"
    _bundle.export(again, [entry])
    assert zipfile.ZipFile(again).namelist() == zipfile.ZipFile(bundle).namelist()


def test_imported(bundle, cache, tmp_path):
    for expected in ("1 new entry", "0 new entries"):
        assert expected in jitops("bundle", "import", bundle, JITOPS_CACHE_DIR=cache)
    bundle.unlink()
    out, _ = run(USE, **nothing(tmp_path, cache))
    assert out.split() == ["42", "False"]


def test_another_compiler_here_does_not_matter(bundle, cache, tmp_path):
    """It has not built what is in the bundle, and need not be asked."""
    fake = tmp_path / "g++"
    fake.write_text("#!/bin/sh\necho gcc version 99 >&2\n")
    fake.chmod(0o755)
    variables = {**nothing(tmp_path, cache), "CXX": fake}
    out, _ = run(USE, **variables, JITOPS_BUNDLE=bundle)
    assert out.split() == ["42", "False"]


@pytest.mark.thorough
def test_ops_by_command(cache, tmp_path):
    """Several instruction sets in one; then a machine without anything."""
    path = tmp_path / "ops.zip"
    levels = ("--cpu", "baseline", "--cpu", "x86-64-v3")
    said = jitops(
        "bundle", "export", path, "improved_triplet_loss", "--backend", "cpp", *levels,
        JITOPS_CACHE_DIR=cache,
    )  # fmt: skip
    assert said.count("jitops_improved_triplet_loss_cpp") == 2
    assert "checked, 0 damaged" in jitops("bundle", "verify", path)
    shutil.rmtree(cache)
    # On this CPU, of whatever level: the best of those that it can run.
    out, _ = run(LOSS, **nothing(tmp_path, cache), JITOPS_BUNDLE=path)
    assert out == "ran\n"


def jitops(*arguments, ok=True, **variables):
    words = [str(one) for one in arguments]
    code = f"from ops._cli.main import main; import sys; sys.exit(main({words!r}))"
    out, err = run(code, ok=ok, **variables)
    return out if ok else err


def test_never_built_is_a_typed_error(cache, settings):
    settings(BUILD="never", CACHE_DIR=str(cache))
    with pytest.raises(ops.NotBuiltError, match="not built yet, and JITOPS_BUILD=never: there is"):
        load_inline("answer", ANSWER, **PLAIN)
    assert not list(cache.rglob("*"))


def damage_library(files):
    name = next(name for name in files if name.endswith(".so"))
    files[name] = files[name][:-1] + b"x"


def truncate_library(files):
    name = next(name for name in files if name.endswith(".so"))
    files[name] = files[name][:100]


def swap_manifest(files):
    name = next(name for name in files if name.endswith("manifest.json"))
    files[name] = files[name].replace(b"answer", b"nswera")


def lose_library(files):
    del files[next(name for name in files if name.endswith(".so"))]


@pytest.mark.parametrize("damage", [damage_library, truncate_library, swap_manifest, lose_library])
def test_damage_is_found_and_never_loaded(bundle, cache, tmp_path, damage):
    archive = zipfile.ZipFile(bundle)
    files = {name: archive.read(name) for name in archive.namelist()}
    damage(files)
    with zipfile.ZipFile(bundle, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    jitops("bundle", "verify", bundle, ok=False)
    _, err = run(USE, ok=False, **nothing(tmp_path, cache), JITOPS_BUNDLE=bundle)
    assert "BundleError" in err
    err = jitops("bundle", "import", bundle, ok=False, JITOPS_CACHE_DIR=cache)
    assert err.startswith("jitops: ")
    assert entries(cache) == []


MANIFESTS = {
    "nothing": "",
    "not JSON": "{",
    "not UTF-8": b"\xff\xfe\xfa",
    "a list": "[1]",
    "no library": '{"name": "answer", "digest": "0"}',
    "no digest": {"digest": 5},
    "another library": {"library": {"file": "../x.so"}},
    "of another library": {"library": {"file": "answer.so", "size": 3, "sha256": "0"}},
    "too deep": "[" * 100_000,
}


@pytest.mark.parametrize("said", MANIFESTS.values(), ids=MANIFESTS)
def test_a_manifest_that_is_none(bundle, cache, settings, capsys, said):
    """With the right checksum, which says nothing of its content."""
    archive = zipfile.ZipFile(bundle)
    files = {name: archive.read(name) for name in archive.namelist()}
    name = next(name for name in files if name.endswith("manifest.json"))
    if isinstance(said, dict):
        said = json.dumps({**json.loads(files[name]), **said})
    files[name] = said
    with zipfile.ZipFile(bundle, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    count, (wrong,) = _bundle.verify(bundle)
    assert count == 1
    assert re.search("answer-.* is damaged: it", wrong)
    assert cli.main(["bundle", "verify", str(bundle)]) == 1
    assert "1 entry checked, 1 damaged" in capsys.readouterr().out
    assert cli.main(["bundle", "import", str(bundle)]) == 1
    assert capsys.readouterr().err.startswith("jitops: ")
    assert entries(cache) == []
    settings(BUNDLE=str(bundle), CACHE_DIR=str(cache))
    with pytest.raises(ops.BundleError, match="is damaged"):
        load_inline("answer", ANSWER, **PLAIN)


def test_an_archive_whose_bytes_have_changed(bundle):
    content = bytearray(bundle.read_bytes())
    with zipfile.ZipFile(bundle) as archive:
        info = next(one for one in archive.infolist() if one.filename.endswith("main.cpp"))
    content[info.header_offset + 30 + len(info.filename) + info.compress_size // 2] ^= 1
    bundle.write_bytes(content)
    with pytest.raises(ops.BundleError, match=r"is damaged, or not a bundle: .*main\.cpp"):
        _bundle.verify(bundle)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"not a zip", "is damaged, or not a bundle"),
        ({}, "is damaged, or not a bundle"),
        ({"bundle.json": "{}"}, "is damaged, or not a bundle"),
        ({"bundle.json": json.dumps({"format": 9, "files": {}})}, "of format 9, not 2"),
    ],
)
def test_what_is_no_bundle(cache, tmp_path, content, text):
    path = tmp_path / "bundle.zip"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            for name, said in content.items():
                archive.writestr(name, said)
    with pytest.raises(ops.BundleError, match=text):
        _bundle.verify(path)


@pytest.mark.parametrize(
    ("name", "status"), [("../../outside", 0), ("/tmp/jitops-outside", 1), ("a/b/c/d", 1), ("a", 0)]
)
def test_a_file_in_an_impossible_place(cache, tmp_path, name, status):
    """It neither gets out of the folder, nor is it an entry."""
    path = tmp_path / "bundle.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("bundle.json", json.dumps({"format": 2}))
        archive.writestr(name, "text")
    cache.mkdir(exist_ok=True)
    assert cli.main(["bundle", "import", str(path)]) == status
    assert entries(cache) == []
    assert not (tmp_path / "outside").exists()
    assert not Path("/tmp/jitops-outside").exists()


def test_a_bundle_that_others_can_write_is_refused(bundle, cache, settings):
    bundle.chmod(0o666)
    settings(BUNDLE=str(bundle), CACHE_DIR=str(cache))
    with pytest.raises(ops.BundleError, match="JITOPS_BUNDLE is refused: .* written by others"):
        load_inline("answer", ANSWER, **PLAIN)


def test_a_bundle_of_somebody_else_is_refused(bundle, cache, settings, monkeypatch):
    settings(BUNDLE=str(bundle), CACHE_DIR=str(cache))
    if os.geteuid() == 0:
        os.chown(bundle, 12345, -1)
    else:
        monkeypatch.setattr(os, "getuid", lambda: os.geteuid() + 1)
    with pytest.raises(ops.BundleError, match="JITOPS_BUNDLE is refused: .* belongs to user"):
        load_inline("answer", ANSWER, **PLAIN)


@pytest.mark.parametrize("what", ["*/*/answer.so", "*/*/manifest.json", "*", "*/*"])
def test_what_others_can_write_in_an_unpacked_bundle_is_not_used(
    bundle, cache, settings, tmp_path, what
):
    folder = tmp_path / "unpacked"
    zipfile.ZipFile(bundle).extractall(folder)
    (path,) = (path for path in folder.glob(what) if path.is_dir() or what != "*")
    path.chmod(0o777)
    settings(BUNDLE=str(folder), CACHE_DIR=str(cache))
    before = path.stat().st_mode
    built = ops.jit.text("answer", ANSWER, **PLAIN)
    assert built.find() is None
    assert not built.load().is_relative_to(folder)
    shutil.rmtree(cache)
    settings(BUNDLE=str(folder), CACHE_DIR=str(cache), BUILD="never")
    with pytest.raises(ops.NotBuiltError, match=f"JITOPS_BUILD=never: {path} can be written by"):
        built.load()
    assert path.stat().st_mode == before


@pytest.mark.parametrize("how", ["imported", "in place"])
def test_programs_run(cache, tmp_path, how):
    source = tmp_path / "program.cpp"
    source.write_text('#include <cstdio>\nint main() { std::puts("hello"); }\n')
    load("program", source, is_python_module=False, is_standalone=True)
    path = tmp_path / "bundle.zip"
    _bundle.export(path, [item.entry for item in _eviction.items(cache)])
    shutil.rmtree(cache)
    variables = {**nothing(tmp_path, cache), "TMPDIR": tmp_path}
    if how == "imported":
        jitops("bundle", "import", path, JITOPS_CACHE_DIR=cache)
    else:
        variables["JITOPS_BUNDLE"] = path
    code = f"""
        import subprocess
        from ops.jit import load
        program = load("program", {str(source)!r}, is_python_module=False, is_standalone=True)
        print(subprocess.check_output([program], text=True))
    """
    out, _ = run(code, **variables)
    assert out.strip() == "hello"


def test_operators_used_in_place_can_be_loaded_again(cache, tmp_path):
    text = OPERATORS.format(namespace="bundled", number=1, schema="int x")
    code = f"""
        import torch
        from ops.jit import load, load_inline
        path = load_inline("bundled", {text!r}, **{STABLE!r})
        torch.ops.load_library(path)
        print(torch.ops.bundled.add(10))
    """
    run(code, JITOPS_CACHE_DIR=cache)
    path = tmp_path / "bundle.zip"
    _bundle.export(path, [item.entry for item in _eviction.items(cache)])
    shutil.rmtree(cache)
    out, _ = run(code, **nothing(tmp_path, cache), JITOPS_BUNDLE=path)
    assert out == "11\n"


def test_a_bundle_that_is_a_special_file(cache, settings, tmp_path):
    os.mkfifo(tmp_path / "bundle.zip", 0o600)
    settings(BUNDLE=str(tmp_path / "bundle.zip"), CACHE_DIR=str(cache))
    with pytest.raises(ops.BundleError, match="JITOPS_BUNDLE must be a file or a folder"):
        load_inline("answer", ANSWER, **PLAIN)


def test_a_bundle_that_is_not_there(cache, settings):
    settings(BUNDLE="/no/such.zip", CACHE_DIR=str(cache))
    with pytest.raises(ops.BundleError, match="folder that is there, got /no/such.zip"):
        load_inline("answer", ANSWER, **PLAIN)


def test_an_export_that_fails_leaves_nothing(cache, tmp_path):
    load_inline("answer", ANSWER, **PLAIN)
    found = [item.entry for item in _eviction.items(cache)]
    with pytest.raises(ops.BundleError, match="cannot be written"):
        _bundle.export(Path("/proc/bundle.zip"), found)
    target = tmp_path / "target"
    target.mkdir()
    with pytest.raises(ops.BundleError, match="cannot be written"):
        _bundle.export(target, found)  # a folder is in the way
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "target"]


def test_a_damaged_entry_is_not_exported(cache, tmp_path, capsys):
    load_inline("answer", ANSWER, **PLAIN)
    (item,) = _eviction.items(cache)
    library = item.entry.library
    content = library.read_bytes()
    library.unlink()
    library.write_bytes(content + b"x")
    assert cli.main(["bundle", "export", str(tmp_path / "x.zip"), "--extension=answer"]) == 1
    assert "cannot be exported: its library is damaged" in capsys.readouterr().err
    assert not (tmp_path / "x.zip").exists()
