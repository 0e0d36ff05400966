"""The JITOPS_ variables, and what JITOPS_FORCE_CPU forbids."""

from __future__ import annotations

import pytest

import ops
from ops import _config
from tests.harness.forks import run
from tests.harness.helpers import LOSS, PURE_TORCH


def test_force_cpu():
    out, err = run(LOSS, JITOPS_FORCE_CPU="1", PATH="/nowhere")
    assert out.split() == [PURE_TORCH]
    assert err == ""


@pytest.mark.parametrize("name", ["cpp", "cuda", "compiled"])
def test_force_cpu_and_a_compiled_backend_contradict(settings, name):
    settings(FORCE_CPU="1", BACKEND=name)
    with pytest.raises(ops.ConfigError, match="JITOPS_FORCE_CPU forces the pure-torch path, but"):
        _config.settings()


@pytest.mark.parametrize("name", ["cpp", "cuda", "compiled"])
def test_force_cpu_forbids_use_backend(settings, name):
    settings(FORCE_CPU="1")
    with (
        pytest.raises(
            ops.ConfigError, match=rf"use_backend\('{name}'\) contradicts JITOPS_FORCE_CPU"
        ),
        ops.use_backend(name),
    ):
        pass


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        (
            "BACKEND",
            "gpu",
            "JITOPS_BACKEND must be one of auto, torch, cpp, cuda, compiled, got 'gpu'",
        ),
        ("FORCE_CPU", "maybe", "JITOPS_FORCE_CPU must be 1 or 0 .*, got 'maybe'"),
        ("STRICT", "2", "JITOPS_STRICT must be 1 or 0 .*, got '2'"),
        ("CACHE_DIR", "here", "JITOPS_CACHE_DIR must be an absolute path .*, got 'here'"),
        ("BUILD_TIMEOUT", "soon", "JITOPS_BUILD_TIMEOUT must be a positive number of seconds, got"),
        ("BUILD_TIMEOUT", "-1", "JITOPS_BUILD_TIMEOUT must be a positive number of seconds, got"),
        ("BUILD_TIMEOUT", "nan", "JITOPS_BUILD_TIMEOUT must be a positive number of seconds, got"),
        ("PROGRESS", "x", "JITOPS_PROGRESS must be 1 or 0 .*, got 'x'"),
    ],
)
def test_unusable_variables(settings, name, value, text):
    settings(**{name: value})
    with pytest.raises(ops.ConfigError, match=text):
        _config.settings()


def test_unknown_variable_is_mentioned(settings):
    settings(BACKND="cpp")
    with pytest.warns(ops.ConfigWarning, match="JITOPS_BACKND is not a variable of jitops"):
        _config.settings()


def test_every_variable_is_documented(root):
    page = (root / "docs/configuration.md").read_text()
    for variable in _config.VARIABLES:
        assert f"| `{variable.name}` | " in page, variable.name
        assert variable.meaning in page, variable.name
