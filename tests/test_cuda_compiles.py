"""What can be known of the CUDA back end without a GPU: that it compiles and links.

nvcc compiles every ``.cu`` for the architectures users have, warnings being errors, and the host
compiler the ``.cpp`` with the CUDA branch switched on. What the latter calls, the former defines.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch

from ops import _extensions
from ops.jit._compile import _toolchain

pytestmark = pytest.mark.nvcc

FOLDER = _extensions.source_folder()
TORCH = Path(torch.__file__).parent / "include"


def run(*command):
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def nvcc():
    return _toolchain.nvcc().command


def newest():
    """The newest architecture this nvcc knows, whose PTX later GPUs will run."""
    known = run(*nvcc(), "--list-gpu-arch").split()
    return max(int(re.fullmatch(r"compute_(\d+)", name)[1]) for name in known)


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """Every op's two objects, compiled with the flags that users' builds have."""
    folder = tmp_path_factory.mktemp("objects")
    ptx = newest()
    architectures = (
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        f"-gencode=arch=compute_{ptx},code=compute_{ptx}",
    )
    for op in _extensions.stems():
        run(
            *nvcc(),
            *_extensions.cuda_cflags(),
            *architectures,
            "-std=c++20",
            "-Werror=all-warnings",
            "-Xcompiler=-fPIC,-Wall,-Wextra,-Werror",
            f"-I{FOLDER}",
            "-MMD",
            "-MF",
            folder / f"{op}.d",
            "-c",
            FOLDER / f"{op}.cu",
            "-o",
            folder / f"{op}.cu.o",
        )
        run(
            *_toolchain.cxx().command,
            *_extensions.cflags(),
            "-DUSE_CUDA",
            "-std=c++20",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-fPIC",
            f"-I{FOLDER}",
            f"-isystem{TORCH}",
            f"-isystem{TORCH / 'torch/csrc/api/include'}",
            f"-isystem{_toolchain.cuda_home() / 'include'}",
            "-c",
            FOLDER / f"{op}.cpp",
            "-o",
            folder / f"{op}.o",
        )
    return folder


def symbols(path, *kinds):
    lines = (line.split() for line in run("nm", path).splitlines())
    return {words[-1] for words in lines if len(words) >= 2 and words[-2] in kinds}


@pytest.mark.parametrize("op", _extensions.stems())
def test_every_launcher_called_is_defined(objects, op):
    called = {name for name in symbols(objects / f"{op}.o", "U") if "launch_" in name}
    defined = {name for name in symbols(objects / f"{op}.cu.o", "T") if "launch_" in name}
    assert called
    assert called == defined


@pytest.mark.parametrize("op", _extensions.stems())
def test_kernels_read_no_header_of_torch(objects, op):
    read = (objects / f"{op}.d").read_text()
    assert f"{op}.h" in read
    assert str(TORCH) not in read


@pytest.mark.parametrize("op", _extensions.stems())
def test_two_files_make_a_library(objects, op):
    """Everything undefined but torch's and CUDA's own symbols is an error."""
    library = objects / f"{op}.so"
    home = _toolchain.cuda_home()
    run(
        *_toolchain.cxx().command,
        "-shared",
        objects / f"{op}.o",
        objects / f"{op}.cu.o",
        f"-L{home / 'lib64'}",
        f"-L{home / 'lib'}",
        "-lcudart",
        "-o",
        library,
    )
    missing = symbols(library, "U")
    assert not [name for name in missing if "jitops" in name]
