"""Everything a binary depends on is in its key."""

from __future__ import annotations

import pytest

import ops
from ops.jit import Spec, _key
from tests.jit.support import ANSWER

pytestmark = pytest.mark.cpp


# field of the request -> how to change it
REQUEST_CHANGES = {
    "name": lambda s, m: s.update(name="other"),
    "sources": lambda s, m: s["sources"][0].write_text(ANSWER + "// changed\n"),
    "cflags": lambda s, m: s.update(extra_cflags=("-O2",)),
    "ldflags": lambda s, m: s.update(extra_ldflags=("-lm",)),
    "cuda_cflags": lambda s, m: s.update(extra_cuda_cflags=("-O2",)),
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
    fields = {"name": "answer", "sources": (source,), "is_python_module": False}
    before = _key.request(Spec(**fields))
    assert _key.digest(before) == _key.digest(_key.request(Spec(**fields)))
    REQUEST_CHANGES[field](fields, monkeypatch)
    after = _key.request(Spec(**fields))
    assert {name for name in after if before[name] != after[name]} == {field}
    assert _key.digest(before) != _key.digest(after)


def test_every_part_of_the_request_is_tested():
    """Those not above have a test of their own, named here."""
    spec = Spec(name="x", cpp_sources=("",), functions=(("f", "f"),))
    own = {"cpp_sources", "cuda_sources", "functions", "implicit_headers", "cpu", "architectures"}
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
    monkeypatch.setattr("ops.jit._hardware.cpu_features", lambda: frozenset({"other"}))
    assert _key.digest(_key.request(native)) != before


def test_architectures_count(monkeypatch):
    monkeypatch.setattr("torch.version.cuda", "13.0")
    spec = Spec(name="x", cpp_sources=("a",), cuda_sources=("b",))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "10.0;9.0+PTX 8.0")
    request = _key.request(spec)
    assert request["architectures"] == ("8.0", "9.0+PTX", "10.0")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 9.0+PTX 10.0")
    assert _key.digest(_key.request(spec)) == _key.digest(request)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 9.0")
    assert _key.digest(_key.request(spec)) != _key.digest(request)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(ops.ToolchainError, match="must hold numbers like .* got 'Hopper'"):
        _key.request(spec)
