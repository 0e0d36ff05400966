"""JITOPS_DEBUG and JITOPS_SANITIZE: builds of their own, for debuggers and sanitizers."""

from __future__ import annotations

import subprocess

import pytest

import ops
from ops.jit._compile import _compilers
from tests.harness import forks
from tests.harness.helpers import run
from tests.jit.support import COMPILER, answer, entries, extension

pytestmark = pytest.mark.cpp


def test_debug_is_a_build_of_its_own(cache, source, settings):
    plain = extension(source).load()
    settings(DEBUG="1", CACHE_DIR=str(cache))
    debug = extension(source).load()
    assert debug != plain
    assert extension(source).effective_spec.extra_cuda_cflags == ()  # of no CUDA
    assert answer(debug) == 42
    assert len(entries(cache)) == 2


def test_debuggers_find_the_users_lines(cache, source, settings):
    source.write_text('\n\nextern "C" int answer() {\n  return 42;\n}\n')
    settings(DEBUG="1", CACHE_DIR=str(cache))
    library = extension(source).load()
    symbols = subprocess.check_output(["nm", str(library)], text=True)
    address = next(line.split()[0] for line in symbols.splitlines() if line.endswith(" answer"))
    told = subprocess.check_output(["addr2line", "-e", str(library), address], text=True)
    assert told.strip() == f"{source}:3"


def test_undefined_behaviour_is_reported(cache, source, settings):
    source.write_text('extern "C" int answer() { volatile int x = 2147483647; return x + 1; }\n')
    code = f"""
        import ctypes, ops.jit
        path = ops.jit.load("answer", {str(source)!r}, is_python_module=False)
        ctypes.CDLL(path).answer()
    """
    _, err = forks.run(code, JITOPS_CACHE_DIR=cache, JITOPS_SANITIZE="undefined")
    assert f"{source}:1" in err
    assert "signed integer overflow" in err


OVERFLOW = """
    import ctypes, ops.jit
    path = ops.jit.load("answer", {source!r}, is_python_module=False)
    ctypes.CDLL(path).answer()
"""


def test_address_needs_its_runtime_and_says_how(cache, source, settings):
    settings(SANITIZE="address", CACHE_DIR=str(cache))
    with pytest.raises(ops.ConfigError, match=r"LD_PRELOAD=.*-print-file-name=libasan.so"):
        extension(source).load()


def test_address_finds_an_overflow(cache, source):
    source.write_text(
        'extern "C" int answer() { int* x = new int[4]; volatile int i = 4; return x[i]; }\n'
    )
    runtime = subprocess.check_output([COMPILER, "-print-file-name=libasan.so"], text=True).strip()
    _, err = run(
        OVERFLOW.format(source=str(source)),
        ok=False,
        JITOPS_CACHE_DIR=cache,
        JITOPS_SANITIZE="address",
        LD_PRELOAD=runtime,
    )
    assert "heap-buffer-overflow" in err
    assert f"{source}:1" in err


def test_leak_needs_its_runtime_and_says_how(cache, source, settings):
    settings(SANITIZE="leak", CACHE_DIR=str(cache))
    with pytest.raises(ops.ConfigError, match=r'=liblsan\.so\)".*LSAN_OPTIONS="exitcode=0"'):
        extension(source).load()
    settings(SANITIZE="address,leak", CACHE_DIR=str(cache))
    with pytest.raises(ops.ConfigError, match=r'libasan\.so\)".*ASAN_OPTIONS="detect'):
        extension(source).load()


def test_leak_finds_a_leak(cache, source):
    """In what was built in such a process, whose compilers may leak as they like."""
    source.write_text(
        '#include <cstdlib>\nextern "C" int answer() {\n  volatile void* x = std::malloc(12345);\n'
        "  x = nullptr;\n  return 42;\n}\n"
    )
    runtime = subprocess.check_output([COMPILER, "-print-file-name=liblsan.so"], text=True).strip()
    _, err = run(
        OVERFLOW.format(source=str(source)),
        JITOPS_CACHE_DIR=cache,
        JITOPS_SANITIZE="leak",
        LD_PRELOAD=runtime,
        # All that Python leaks is reported too: of more calls, in a quarter of a minute.
        LSAN_OPTIONS="exitcode=0:malloc_context_size=2",
    )
    assert "Direct leak of 12345 byte(s) in 1 object(s)" in err
    assert f"in answer {source}:3" in err


def test_tools_run_without_the_sanitizers_runtime(monkeypatch):
    monkeypatch.setenv("LD_PRELOAD", "/x/libasan.so.8:libfine.so liblsan.so")
    assert "LD_PRELOAD" not in _compilers.environ()
    monkeypatch.setenv("LD_PRELOAD", "libfine.so")
    assert _compilers.environ()["LD_PRELOAD"] == "libfine.so"


@pytest.mark.parametrize("value", ["memory", "address,thread", "thread,leak", "address;undefined"])
def test_unknown_sanitizers(settings, value):
    settings(SANITIZE=value)
    with pytest.raises(ops.ConfigError, match="JITOPS_SANITIZE must be some of address, undef"):
        from ops import _config

        _config.settings()
