"""Machines, processes and sources as other projects' users have reported them."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import sysconfig
import textwrap
import time
from pathlib import Path

import pytest

import ops
from ops.jit import load, load_inline, text
from ops.jit._cache import _location
from ops.jit._compile import _cpu
from tests.harness import helpers
from tests.harness.forks import run, start
from tests.jit.support import ANSWER, COMPILER, answer, entries, extension, leftovers
from tests.jit.test_drop_in import STABLE
from tests.jit.test_stale import alone, wrapper

pytestmark = pytest.mark.cpp

PLAIN = {"is_python_module": False, "no_implicit_headers": True}
BUILD = f"""
    import ctypes, sys, ops, ops.jit
    path = ops.jit.load_inline("answer", {ANSWER!r}, **{PLAIN})
    print(ctypes.CDLL(path).answer())
"""


# ---- machines ------------------------------------------------------------------------------------


@pytest.mark.parametrize("home", [None, "/nonexistent"])
def test_a_user_without_a_home_whose_compiler_is_behind_ccache(
    cache, tmp_path, source, monkeypatch, home
):
    """ccache needs a home folder, and this user may be in no list of users."""

    def unknown(uid):
        raise KeyError(uid)

    script = wrapper(
        tmp_path / "ccache",
        '[ "$HOME" ] || exit 1',
        '[ -w "$HOME" ] && [ "$HOME" != / ] || [ "$CCACHE_DISABLE" ] || exit 1',
        'exec "$@"',
    )
    monkeypatch.setattr("pwd.getpwuid", unknown)
    monkeypatch.setenv("HOME", home) if home else monkeypatch.delenv("HOME")
    monkeypatch.setenv("CXX", f"{script} {COMPILER}")
    assert answer(extension(source).load()) == 42
    assert extension(source).find()


def test_an_environment_at_an_odd_place(cache, tmp_path):
    """torch writes its own folder unquoted."""
    name = "a b&c;d$e(f)g'h"
    (tmp_path / name).mkdir()
    packages = tmp_path / name / "site-packages"
    packages.symlink_to(sysconfig.get_path("purelib"))
    path = f"{packages}{os.pathsep}{helpers.PACKAGE}"
    code = "import torch\nprint(torch.__file__)\n" + textwrap.dedent(BUILD)
    out, _ = helpers.run(code, JITOPS_CACHE_DIR=cache, PYTHONPATH=path)
    assert out == f"{packages}/torch/__init__.py\n42\n"


def test_site_packages_made_of_symlinks(cache, tmp_path):
    """As uv makes them: torch's headers are still torch's, and a hit looks at none of them."""
    packages = tmp_path / "site-packages"
    packages.mkdir()
    torchs = os.path.join(sysconfig.get_path("purelib"), "torch")
    subprocess.run(["cp", "-rs", torchs, packages], check=True)
    source = f"#include <torch/csrc/stable/library.h>\n{ANSWER}"
    code = f"""
        import os, torch
        from ops.jit import text
        built = text("answer", {source!r}, **{STABLE!r})
        built.build()
        real, seen = os.stat, []
        def stat(path, *arguments, **named):
            seen.append(os.fspath(path) if not isinstance(path, int) else "")
            return real(path, *arguments, **named)
        os.stat = stat
        assert built.find()
        print(torch.__file__, sum("/torch/include/" in path for path in seen))
    """
    path = f"{packages}{os.pathsep}{helpers.PACKAGE}"
    out, _ = helpers.run(code, JITOPS_CACHE_DIR=cache, PYTHONPATH=path)
    assert out.split() == [f"{packages}/torch/__init__.py", "0"]


@pytest.mark.mounts
def test_a_cache_in_a_lower_layer_of_an_image(cache, tmp_path):
    """Its folders cannot be renamed (EXDEV): what is damaged is replaced, and what is old goes."""
    for name in ("damaged", "old"):
        text(name, ANSWER, **PLAIN).build()
    (library,) = cache.glob("damaged-*/*/damaged.so")
    library.chmod(0o755)
    library.write_bytes(b"damaged")
    code = f"""
    import os
    from ops.jit import text
    from ops._cli.main import main
    folder = {str(tmp_path)!r}
    os.chdir(folder)
    mount("-t", "tmpfs", "tmpfs", f"{{{{folder}}}}/layers")
    for name in ("upper", "work"):
        os.mkdir(f"{{{{folder}}}}/layers/{{{{name}}}}")
    layers = f"lowerdir={{{{folder}}}}/cache,upperdir={{{{folder}}}}/layers/upper"
    layers += f",workdir={{{{folder}}}}/layers/work,redirect_dir=off"
    mount("-t", "overlay", "overlay", "-o", layers, f"{{{{folder}}}}/cache")
    built = text("damaged", {ANSWER!r}, **{PLAIN})
    print(ctypes.CDLL(str(built.load())).answer(), built.find() is not None)
    os.environ["JITOPS_CACHE_MAX_SIZE"] = "1"
    from ops import _config
    _config.settings.cache_clear()
    print(ctypes.CDLL(str(text("new", {ANSWER!r}, **{PLAIN}).load())).answer())
    print(main(["cache", "clean"]), [one for one in os.listdir("cache") if one.startswith("old")])
    """.replace("{{", "{").replace("}}", "}")
    (tmp_path / "layers").mkdir()
    out = alone(code, cache)
    assert out[:3] == ["42", "True", "42"]
    assert out[-1] == "[]"


def test_another_thing_called_ninja(cache, tmp_path):
    """A folder of that name here, a broken one first on PATH, a relative place on PATH."""
    (tmp_path / "here" / "ninja").mkdir(parents=True)
    (tmp_path / "here" / "ninja" / "__init__.py").write_text("raise RuntimeError('not it')\n")
    (tmp_path / "bin").mkdir()
    wrapper(tmp_path / "bin" / "ninja", "exit 1")
    path = f".:{tmp_path / 'bin'}:{os.environ['PATH']}"
    out, _ = run(BUILD, cwd=tmp_path / "here", JITOPS_CACHE_DIR=cache, PATH=path)
    assert out == "42\n"


def test_setuptools_is_not_needed(cache):
    """torch imports it for setup.py."""
    out, _ = run(f"import sys\nsys.modules['setuptools'] = None\n{textwrap.dedent(BUILD)}",
                 JITOPS_CACHE_DIR=cache)  # fmt: skip
    assert out == "42\n"


LACKS = {
    "modes": (Path, "chmod", errno.EPERM),
    "locks": (fcntl, "flock", errno.ESTALE),
    "truncation": (os, "ftruncate", errno.EIO),
    "flags": (os, "statvfs", errno.ENOSYS),
}


@pytest.mark.parametrize(("where", "name", "number"), LACKS.values(), ids=LACKS)
def test_a_file_system_that_lacks_something(cache, source, monkeypatch, where, name, number):
    def lacking(*arguments, **options):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(where, name, lacking)
    assert answer(extension(source).load()) == 42
    assert len(entries(cache)) == 1


def test_a_file_system_that_cannot_rename_folders(cache, tmp_path, source, monkeypatch):
    real = os.rename

    def rename(old, new):
        if os.path.isdir(old) and str(old).startswith(str(cache)):
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        real(old, new)

    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(_location, "private_root", lambda: tmp_path / "private")
    with pytest.warns(ops.CacheWarning, match="cannot be written .Operation not supported"):
        assert extension(source).load().is_relative_to(tmp_path / "private")


@pytest.mark.mounts
def test_a_file_system_at_an_odd_place(tmp_path):
    code = """
    from pathlib import Path
    from ops.jit._cache import _location
    os.chdir("FOLDER")
    for name in (b"a b", b"caf\\xe9"):
        os.mkdir(name)
        mount("-t", "tmpfs", "tmpfs", os.fsdecode(name))
        print(_location.file_system(Path(os.fsdecode(os.path.abspath(name)))))
    """.replace("FOLDER", str(tmp_path))
    assert alone(code, tmp_path / "cache") == ["tmpfs", "tmpfs"]


def test_memory_that_is_in_use_does_not_count(tmp_path, monkeypatch):
    (tmp_path / "memory.max").write_text(f"{8 << 30}")
    (tmp_path / "memory.current").write_text(f"{7 << 30}")
    monkeypatch.setattr(_cpu, "_CGROUPS", str(tmp_path))
    assert _cpu.memory_limit() <= 8 << 30
    assert _cpu.free_memory() <= 1 << 30


# ---- processes -----------------------------------------------------------------------------------


def test_a_thread_after_the_main_thread(cache):
    code = textwrap.dedent(BUILD)
    code = (
        "import threading, time, ops.jit\n"
        f"def work():\n    time.sleep(0.3)\n    exec({code!r}, {{}})\n"
        "threading.Thread(target=work).start()\n"
    )
    out, _ = run(code, whole_end=True, JITOPS_CACHE_DIR=cache)
    assert out == "42\n"


def test_no_poll(cache, tmp_path):
    """eventlet takes it away."""
    compiler = wrapper(tmp_path / "c++", f'exec {COMPILER} "$@"')  # so that it is asked who it is
    code = textwrap.dedent(BUILD)
    code = f"import select, subprocess\ndel select.poll, select.epoll\n{code}{code}"
    out, _ = run(code, JITOPS_CACHE_DIR=cache, CXX=compiler)
    assert out == "42\n42\n"


def gone(pid):
    """Whether a process ends within half a minute. Process 1 may be slow to reap it."""
    for _ in range(600):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_compilers_end_with_their_process(cache, tmp_path, how):
    """Whatever ends that, and though it alone is told."""
    slow = wrapper(
        tmp_path / "slow-g++",
        f'case "$*" in *" -c "*main.cpp*) echo $$ > {tmp_path}/pid; sleep 60;; esac',
        f'exec {COMPILER} "$@"',
    )
    process = start(BUILD, JITOPS_CACHE_DIR=cache, CXX=slow)
    deadline = time.time() + 60
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text().strip():
        assert time.time() < deadline
        time.sleep(0.02)
    process.send_signal(how)
    process.communicate()
    assert process.returncode == -how
    assert gone(int((tmp_path / "pid").read_text()))


def test_a_ninja_that_prints_when_its_process_ends_ends_its_compilers(tmp_path):
    """Nobody reads that output. A SIGPIPE would kill ninja, and its compilers would go on."""
    ninja = wrapper(
        tmp_path / "ninja",
        f"trap 'touch {tmp_path}/ended; exit' TERM",
        f"touch {tmp_path}/begun",
        "while :; do echo line; done",
    )
    process = start(
        f"""
        import os, signal
        from pathlib import Path
        from ops.jit._compile import _runner
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores it, some programs do not
        _runner.run(Path({str(tmp_path)!r}), [{str(ninja)!r}], dict(os.environ), echo=False)
        """
    )
    deadline = time.time() + 30
    while not (tmp_path / "begun").exists():
        assert time.time() < deadline
        time.sleep(0.02)
    process.kill()
    process.communicate()
    while not (tmp_path / "ended").exists():
        assert time.time() < deadline
        time.sleep(0.02)


SIGCHLD = {
    "ignored": "signal.signal(signal.SIGCHLD, signal.SIG_IGN)",
    "taken by a handler": """
def reap(*_):
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass
signal.signal(signal.SIGCHLD, reap)
""",
}


@pytest.mark.parametrize("how", SIGCHLD.values(), ids=SIGCHLD)
def test_children_whose_end_somebody_else_takes(cache, how):
    """A good build is good, and a bad one is diagnosed."""
    bad = """
    try:
        ops.jit.load_inline("bad", "int x = oops;", is_python_module=False,
                            no_implicit_headers=True)
    except ops.BuildError as error:
        print(error)
    """
    code = f"import os, signal\n{how}\n{textwrap.dedent(BUILD)}\n{textwrap.dedent(bad)}"
    out, _ = run(code, JITOPS_CACHE_DIR=cache)
    assert out.startswith("42\n")
    assert "bad[0].cpp:1: " in out


def test_a_locale_that_cannot_write_the_path(tmp_path):
    """The log is written all the same."""
    code = """
        import ops, ops.jit
        try:
            ops.jit.load_inline("bad", "int x = oops;", is_python_module=False,
                                no_implicit_headers=True)
        except ops.BuildError as error:
            print(ascii(str(error)))
    """
    cache = tmp_path / "caf\u00e9"
    variables = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    helpers.run(code, JITOPS_CACHE_DIR=cache, **variables)
    assert "oops" in next(cache.glob("logs/*.log")).read_text(errors="replace")


def test_ranks_that_each_write_the_same_header(cache, tmp_path, monkeypatch):
    """It is written once more while the first of them compiles: nobody is told of that."""
    (tmp_path / "v.h").write_text("#define GIVEN 1\n")
    script = wrapper(
        tmp_path / "c++",
        f'{COMPILER} "$@" || exit',
        f'case "$*" in *" -c "*main.cpp*) [ -e {tmp_path}/done ] || '
        f"{{ cp {tmp_path}/v.h {tmp_path}/w.h; cat {tmp_path}/w.h > {tmp_path}/v.h; "
        f"touch {tmp_path}/done; }};; esac",
    )
    monkeypatch.setenv("CXX", str(script))
    source = '#include "v.h"\nextern "C" int answer() { return GIVEN; }\n'
    built = text("answer", source, extra_include_paths=[tmp_path], **PLAIN)
    assert answer(built.load()) == 1
    assert (tmp_path / "done").exists()
    assert built.find()
    assert leftovers(cache) == []


# ---- sources -------------------------------------------------------------------------------------

STRICT = [
    ["-Werror", "-Wmissing-declarations", "-Wall", "-Wextra"],
    ["-x", "c", "-std=c11"],
    ["-fvisibility=hidden", "-fno-exceptions"],
]


@pytest.mark.parametrize("flags", STRICT, ids=" ".join)
def test_flags_that_only_the_users_own_text_is_made_for(cache, tmp_path, flags):
    source = tmp_path / "plain.c"
    source.write_text("int answer(void);\nint answer(void) { return 42; }\n")
    (tmp_path / "plain.cpp").write_text(f'extern "C" int answer(void);\n{ANSWER}')
    given = source if "c" in flags else tmp_path / "plain.cpp"
    if "-fvisibility=hidden" in flags:
        given.write_text('extern "C" __attribute__((visibility("default"))) ' + ANSWER[11:])
    assert answer(load("plain", given, extra_cflags=flags, is_python_module=False)) == 42


def test_a_library_without_start_files(cache):
    flags = ["-nostdlib", "-nostartfiles"]
    assert answer(load_inline("bare", ANSWER, extra_ldflags=flags, **PLAIN)) == 42


@pytest.mark.parametrize("ending", [".C", ".CPP", ".c++", ".cp", ".cc"])
def test_endings_of_sources(cache, tmp_path, ending):
    source = tmp_path / f"answer{ending}"
    source.write_text(ANSWER)
    assert answer(load("answer", source, is_python_module=False)) == 42


@pytest.mark.parametrize("ending", [".S", ".s"])
def test_assembly(cache, tmp_path, ending):
    source = tmp_path / f"answer{ending}"
    source.write_text(
        ".globl given\n.type given, @function\ngiven:\n  mov $41, %eax\n  ret\n"
        '.section .note.GNU-stack,"",@progbits\n'
    )
    caller = tmp_path / "caller.cpp"
    caller.write_text('extern "C" int given();\nextern "C" int answer() { return given() + 1; }\n')
    assert answer(load("answer", [source, caller], is_python_module=False)) == 42


def test_a_module_of_a_package(cache):
    """Its last part names the function that Python calls."""
    source = """
    #include <Python.h>
    static PyModuleDef module = {PyModuleDef_HEAD_INIT, "inner"};
    PyMODINIT_FUNC PyInit_inner() { return PyModule_Create(&module); }
    """
    module = load_inline("outer.inner", source, no_implicit_headers=True)
    assert module.__name__ == "outer.inner"
    sys.modules.pop("outer.inner", None)


@pytest.mark.parametrize("name", ["a'b", 'a"b', "a b", "a;b", "a&b", "*", "a\\b", "a\tb", "a(b)"])
def test_folders_of_odd_names(cache, tmp_path, name):
    """They build with torch too."""
    folder = tmp_path / name
    folder.mkdir()
    (folder / "given.h").write_text("#define GIVEN 1\n")
    source = folder / "answer.cpp"
    source.write_text('#include <given.h>\nextern "C" int answer() { return GIVEN; }\n')
    arguments = {"extra_include_paths": [folder], "is_python_module": False}
    assert answer(load("answer", source, **arguments)) == 1
    (folder / "given.h").write_text("#define GIVEN 2\n")
    assert answer(load("answer", source, **arguments)) == 2


def test_folders_of_headers_are_stripped(cache, tmp_path):
    (tmp_path / "given.h").write_text("#define GIVEN 1\n")
    source = '#include <given.h>\nextern "C" int answer() { return GIVEN; }\n'
    found = load_inline("answer", source, extra_include_paths=[f"  {tmp_path} \n"], **PLAIN)
    assert answer(found) == 1


@pytest.mark.parametrize(("is_module", "error"), [(True, ImportError), (False, OSError)])
def test_what_does_not_load_is_an_error_of_python_too(cache, is_module, error):
    """So that a package's own fall-back goes on working."""
    source = 'int nowhere();\nextern "C" int f() { return nowhere(); }\n'
    flags = ["-Wl,--unresolved-symbols=ignore-all", "-Wl,-z,now"]
    with pytest.raises(error, match="does not load") as raised:
        load_inline(
            "unloadable",
            source,
            extra_ldflags=flags,
            is_python_module=is_module,
            no_implicit_headers=True,
        )
    assert isinstance(raised.value, ops.BuildError)
