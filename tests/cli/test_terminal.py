"""The command in a real terminal, narrow and wide."""

from __future__ import annotations

import contextlib
import re
import shlex
import subprocess
import sys
import time

import pytest

from tests.harness.forks import command
from tests.harness.helpers import environment

pytestmark = [pytest.mark.tmux, pytest.mark.cpp]
OP = "improved_triplet_loss"
WIDTHS = (80, 120)


class Terminal:
    """A terminal of tmux, which runs one command."""

    def __init__(self, folder, width, **variables):
        self._folder, self._tmux = folder, ["tmux", "-S", str(folder / "tmux"), "-f", "/dev/null"]
        self._variables, self._width = variables, str(width)

    def _run(self, *words):
        environ = environment(**self._variables)
        command = [*self._tmux, *words]
        return subprocess.run(command, env=environ, check=True, capture_output=True, text=True)

    def run(self, *arguments):
        """The lines on the screen once the command has ended, and all bytes that it wrote."""
        written, status = self._folder / "written", self._folder / "status"
        command = shlex.join([sys.executable, "-m", "ops", *arguments])
        script = f"read go; {command}; echo $? > {status}; read go"
        self._run("new-session", "-d", "-x", self._width, "-y", "50", script)
        try:
            self._run("pipe-pane", f"exec cat > {written}")
            self._run("send-keys", "Enter")
            until = time.monotonic() + 120
            while not status.exists() or not status.read_text():
                assert time.monotonic() < until, self._run("capture-pane", "-p").stdout
                time.sleep(0.1)
            time.sleep(0.3)  # for the last bytes to reach the screen
            screen = self._run("capture-pane", "-p").stdout
        finally:
            with contextlib.suppress(subprocess.CalledProcessError):
                self._run("kill-server")
        assert status.read_text() == "0\n", screen
        return screen.split("\n", 1)[1].strip().splitlines(), written.read_bytes()


@pytest.mark.parametrize("width", [80, pytest.param(120, marks=pytest.mark.thorough)])
def test_a_build_is_two_lines(tmp_path, width):
    """One line when it starts and one when it is done, without an escape code."""
    variables = {"JITOPS_CACHE_DIR": tmp_path / "cache", "JITOPS_PROGRESS": "1"}
    screen, written = Terminal(tmp_path, width, **variables).run("build", OP, "--backend=cpp")
    expected = [
        rf"jitops: compiling jitops_{OP}_cpp \(1 file\)",
        rf"jitops: compiled jitops_{OP}_cpp \(1 file\) in \d+\.\d s",
        r"1 of 1 built or in the cache, \d+\.\d s",
    ]
    assert len(screen) == len(expected), "\n".join(screen)
    for line, pattern in zip(screen, expected, strict=True):
        assert re.fullmatch(pattern, line)
    assert b"\x1b" not in written


@pytest.mark.thorough
def test_a_list_of_entries_fits(tmp_path):
    variables = {"JITOPS_CACHE_DIR": tmp_path / "cache"}
    op = "batch_hard_triplet_loss"  # a long name
    name = f"jitops_{op}_cpp"
    command("build", op, "--backend=cpp", **variables)
    for width in WIDTHS:
        folder = tmp_path / str(width)
        folder.mkdir()
        (head, row, total), _ = Terminal(folder, width, **variables).run("cache", "ls")
        assert head.split() == ["name", "digest", "size", "age", "unused", "loads"]
        assert re.fullmatch(rf"{name} +[0-9a-f]{{8}} +\d+ K +\d+ s +\d+ s +0", row)
        assert total.startswith("1 entry, ")


@pytest.mark.thorough
def test_the_doctor_cuts_nothing_off(tmp_path):
    variables = {"JITOPS_CACHE_DIR": tmp_path / "cache"}
    command("build", OP, "--backend=cpp", **variables)
    screen, _ = Terminal(tmp_path, 80, **variables).run("doctor")
    assert "…" not in "".join(screen)
    (library,) = (tmp_path / "cache").glob("*/*/*.so")
    assert f"cached:{library}" in "".join(line.strip() for line in screen)
