"""Everything a binary depends on is in its key."""

from __future__ import annotations

import shutil
import subprocess

import pytest

import ops
from ops.jit import Spec, _key
from ops.jit._compile import _cpu, _gpu_archs
from tests.jit.support import ANSWER, COMPILER, extension

pytestmark = pytest.mark.cpp


# field of the request -> how to change it
REQUEST_CHANGES = {
    "name": lambda s, m: s.update(name="other"),
    "sources": lambda s, m: s["sources"][0].write_text(ANSWER + "// changed\n"),
    "extra_cflags": lambda s, m: s.update(extra_cflags=("-O2",)),
    "extra_ldflags": lambda s, m: s.update(extra_ldflags=(*s["extra_ldflags"], "-lm")),
    "extra_cuda_cflags": lambda s, m: s.update(extra_cuda_cflags=("-O2",)),
    "files": lambda s, m: s["sources"][0].with_suffix(".list").write_bytes(b"x"),
    "folders": lambda s, m: s.update(extra_include_paths=(s["sources"][0].parent,)),
    "cuda": lambda s, m: s.update(with_cuda=True),
    "with_pytorch_error_handling": lambda s, m: s.update(with_pytorch_error_handling=False),
    "is_standalone": lambda s, m: s.update(is_standalone=True),
    "torch": lambda s, m: m.setattr("torch.__version__", "9.9"),
    "cxx11_abi": lambda s, m: m.setattr("torch.compiled_with_cxx11_abi", lambda: "other"),
    "python": lambda s, m: s.update(is_python_module=True),
    "platform": lambda s, m: m.setattr("platform.machine", lambda: "pdp11"),
    "cxx_arguments": lambda s, m: m.setenv("CXX", "g++ -m32"),
    "environment": lambda s, m: m.setenv("CPATH", "/somewhere"),
    "format": lambda s, m: m.setattr(_key, "FORMAT", 99),
}


@pytest.mark.parametrize("field", REQUEST_CHANGES)
def test_every_part_of_the_request_counts(source, monkeypatch, field):
    fields = {
        "name": "answer",
        "sources": (source,),
        "extra_ldflags": (f"-Wl,--retain-symbols-file={source.with_suffix('.list')}",),
        "is_python_module": False,
    }
    before = _key.request(Spec(**fields))
    assert _key.digest(before) == _key.digest(_key.request(Spec(**fields)))
    REQUEST_CHANGES[field](fields, monkeypatch)
    after = _key.request(Spec(**fields))
    assert {name for name in after if before[name] != after[name]} == {field}
    assert _key.digest(before) != _key.digest(after)


def test_every_part_of_the_request_is_tested():
    """Those not above have a test of their own, named here."""
    spec = Spec(name="x", cpp_sources=("",), functions=(("f", "f"),))
    own = {"cpp_sources", "cuda_sources", "functions", "implicit_headers", "cpu"}
    assert set(_key.request(spec)) == set(REQUEST_CHANGES) | own


def test_inline_text_counts():
    base = {"name": "x", "cpp_sources": ("a",)}
    specs = [
        Spec(**base),
        Spec(**{**base, "cpp_sources": ("b",)}),
        Spec(**{**base, "cpp_sources": ("a", "")}),
        Spec(**base, functions=(("f", "f"),)),
        Spec(**base, no_implicit_headers=True),
    ]
    assert len({_key.digest(_key.request(spec)) for spec in specs}) == len(specs)


def test_instruction_set_counts_only_where_native(monkeypatch):
    native = Spec(name="x", cpp_sources=("a",), extra_cflags=("-march=native",))
    assert _key.request(Spec(name="x", cpp_sources=("a",)))["cpu"] == []
    before = _key.digest(_key.request(native))
    monkeypatch.setattr("ops.jit._compile._cpu.features", lambda: frozenset({"other"}))
    assert _key.digest(_key.request(native)) != before


@pytest.mark.parametrize("where", ["CXX", "cflags", "ldflags", "nvcc"])
def test_the_instruction_set_counts_wherever_it_is_asked_for(monkeypatch, where):
    if where == "CXX":
        monkeypatch.setenv("CXX", "g++ -march=native")
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "-Xcompiler=-march=native")
    flags = {"nvcc": {"with_cuda": True}, "cflags": {"extra_cflags": ("-m'arch=nat'ive",)}}
    flags["ldflags"] = {"extra_ldflags": ("-flto", "-march=native")}
    spec = Spec(name="x", cpp_sources=("a",), **flags.get(where, {}))
    asked = _key.request(spec)
    assert asked["cpu"] == sorted(_cpu.features())
    assert _key.again(asked)["cpu"] == asked["cpu"]


def test_files_that_the_compilers_command_names_count(tmp_path, monkeypatch):
    specs = tmp_path / "given.specs"
    specs.write_text("1")
    monkeypatch.setenv("CXX", f"{shutil.which('env')} {COMPILER} -specs={specs}")
    spec = Spec(name="x", cpp_sources=("a",))
    before = _key.request(spec)
    assert [name for name, _ in before["files"]] == ["given.specs"]
    specs.write_text("2")
    assert _key.digest(_key.request(spec)) != _key.digest(before)


@pytest.mark.parametrize(
    "name",
    [
        *("CPATH", "CPLUS_INCLUDE_PATH", "LIBRARY_PATH", "LD_RUN_PATH", "COMPILER_PATH"),
        *("GNUTARGET", "LDEMULATION", "SOURCE_DATE_EPOCH", "NVCC_APPEND_FLAGS", "NVCC_CCBIN"),
    ],
)
def test_variables_that_compilers_and_linkers_read(monkeypatch, name):
    spec = Spec(name="x", cpp_sources=("a",), with_cuda=name.startswith("NVCC"))
    monkeypatch.delenv(name, raising=False)
    before = _key.digest(_key.request(spec))
    monkeypatch.setenv(name, "1")
    assert _key.digest(_key.request(spec)) != before


def test_the_run_path_that_the_linker_reads(cache, source, monkeypatch):
    first = extension(source).load()
    monkeypatch.setenv("LD_RUN_PATH", "/somewhere/else")
    second = extension(source).load()
    said = [subprocess.check_output(["readelf", "-d", one], text=True) for one in (first, second)]
    assert ["/somewhere/else" in one for one in said] == [False, True]


def test_architectures_are_in_order_and_checked(monkeypatch):
    monkeypatch.setattr("torch.version.cuda", "13.0")
    spec = Spec(name="x", cpp_sources=("a",), cuda_sources=("b",))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "10.0;9.0+PTX 8.0")
    assert _gpu_archs.architectures_of(spec) == ("8.0", "9.0+PTX", "10.0")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Volta;Hopper Ampere")
    assert _gpu_archs.architectures_of(spec) == ("7.0+PTX", "8.0", "8.6+PTX", "9.0+PTX")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Ampere+Tegra")
    assert _gpu_archs.architectures_of(spec) == ("8.7",)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hoper")
    with pytest.raises(ops.ToolchainError, match="must hold numbers like .* got 'Hoper'"):
        _gpu_archs.architectures_of(spec)
    own = Spec(name="x", cuda_sources=("b",), extra_cuda_cflags=("-arch=sm_90",))
    assert _gpu_archs.architectures_of(own) == ()


@pytest.mark.parametrize(
    ("built_for", "needed", "serves"),
    [
        ("8.0 9.0", "9.0", True),
        ("8.0", "8.6", True),  # a later minor version
        ("8.6", "8.0", False),
        ("9.0", "10.0", False),
        ("9.0+PTX", "10.0", True),  # compiled by the driver
        ("9.0+PTX", "8.0", False),
        ("9.0a", "9.0", False),
        ("9.0a", "9.0a", True),
        ("10.0a", "10.3", False),
        ("9.0", "9.0+PTX", False),  # PTX was asked for
        ("9.0+PTX", "9.0+PTX", True),
        ("8.0+PTX", "9.0+PTX", False),
        ("", "8.0", False),
    ],
)
def test_what_code_serves_which_architecture(built_for, needed, serves):
    assert _gpu_archs.serves(built_for.split(), needed) is serves
