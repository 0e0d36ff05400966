"""Object files, each compiled once for all processes of a run of the tests."""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ops.jit._compile import _compilers


@dataclass(frozen=True)
class Job:
    """An object file to compile.

    Attributes:
        flags: of the compiler, without the folders of ``headers`` and ``system``.
        headers: folders of headers.
        system: folders of headers in which warnings are no errors.
        suffixes: those of the headers that the source may read.
        renamed: symbols, and their new names.
    """

    name: str
    source: Path
    flags: tuple[str, ...]
    headers: tuple[Path, ...] = ()
    system: tuple[Path, ...] = ()
    suffixes: tuple[str, ...] = (".h", ".cuh")
    renamed: dict[str, str] = field(default_factory=dict)

    def command(self) -> list[str]:
        folders = [f"-I{one}" for one in self.headers]
        folders += [word for one in self.system for word in ("-isystem", str(one))]
        cxx = _compilers.cxx().command
        return [*cxx, "-std=c++20", "-fPIC", "-g1", *folders, *self.flags, str(self.source)]

    def digest(self) -> str:
        """Of the flags and of all text that may be compiled, wherever it is."""
        folders = (*self.headers, *self.system)
        files = (path for folder in folders for path in sorted(folder.rglob("*")))
        texts = [path.read_bytes() for path in files if path.suffix in self.suffixes]
        texts.append(self.source.read_bytes())
        tools = torch.__version__, _compilers.cxx()
        of = *tools, self.source.name, self.flags, self.renamed, texts
        return hashlib.sha256(repr(of).encode()).hexdigest()[:16]


def compile_all(*jobs: Job) -> list[Path]:
    """The objects. Those that no process has compiled yet are compiled now.

    An object that another process is compiling is left until the others are there, because several
    processes often begin with the same op.
    """
    folder = Path(os.environ["TESTS_CACHE_DIR"], "emulator")
    folder.mkdir(parents=True, exist_ok=True)
    objects = [folder / f"{job.digest()}-{job.name}.o" for job in jobs]
    for patience in (fcntl.LOCK_NB, 0):
        for job, path in zip(jobs, objects, strict=True):
            if not path.exists():
                _compile(job, path, patience)
    return objects


def _compile(job: Job, path: Path, patience: int) -> None:
    with path.with_suffix(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | patience)
        except BlockingIOError:
            return
        if path.exists():
            return
        new = path.with_suffix(".new")
        command = [*job.command(), "-c", "-o", str(new)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        if job.renamed:
            words = (f"--redefine-sym={one}={other}" for one, other in job.renamed.items())
            subprocess.run(["objcopy", *words, str(new)], check=True)
        new.rename(path)
