"""Every ``JITOPS_*`` environment variable: its meaning, its parser, its default, its error text.

The environment is read once, at the first call of :func:`settings`.
"""

from __future__ import annotations

import functools
import os
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from ops import _namesake
from ops._errors import ConfigError, ConfigWarning, did_you_mean

_namesake.check()  # here, because all modules import the settings

COMPILED = ("cpp", "cuda", "compiled")  # requests that need a compiler or compiled code
Backend = Literal["auto", "torch", "cpp", "cuda", "compiled"]
BACKENDS = get_args(Backend)
BUILD = ("auto", "never")
SANITIZERS = ("address", "undefined", "leak", "thread")

_TRUE = ("1", "true", "yes", "on")
_FALSE = ("0", "false", "no", "off")


@dataclass(frozen=True)
class Settings:
    """The parsed environment; field ``x`` comes from ``JITOPS_X``."""

    backend: str
    force_cpu: bool
    strict: bool
    cache_dir: Path | None
    cache_max_size: int
    trust_group: bool
    bundle: Path | None
    build: str
    build_timeout: float
    retry: bool
    pch: bool
    debug: bool
    sanitize: tuple[str, ...]
    progress: bool


@dataclass(frozen=True)
class Variable:
    """One environment variable: the words of its documentation and of its error."""

    field: str
    default: Any
    meaning: str
    must_be: str
    parse: Callable[[str], Any]
    choices: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"JITOPS_{self.field.upper()}"


def backend_name(text: str) -> str:
    """``text`` as the name of a back end; :class:`ValueError` when it is none."""
    if text not in BACKENDS:
        raise ValueError(text)
    return text


def _switch(text: str) -> bool:
    lowered = text.lower()
    if lowered not in _TRUE + _FALSE:
        raise ValueError(text)
    return lowered in _TRUE


def _path(text: str) -> Path:
    try:
        path = Path(text).expanduser()
    except RuntimeError:  # no such user
        raise ValueError(text) from None
    if not path.is_absolute():
        raise ValueError(text)
    return path


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError(text)
    return value


_UNITS = {"": 1, "k": 10, "m": 20, "g": 30, "t": 40}


def size(text: str) -> int:
    """``text``, like 500M or 2G, as bytes; :class:`ValueError` when it is none."""
    matched = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", text.lower())
    if matched is None:
        raise ValueError(text)
    unit = matched[2]
    return round(float(matched[1]) * (1 << _UNITS[unit] if unit else 1))


def _when_to_build(text: str) -> str:
    if text not in BUILD:
        raise ValueError(text)
    return text


def _sanitizers(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    alone = "thread" in names and {"address", "leak"} & set(names)
    if not set(names) <= set(SANITIZERS) or alone:
        raise ValueError(text)
    return names


_A_SWITCH = "1 or 0 (also true/false, yes/no, on/off)"

VARIABLES = (
    Variable(
        "backend",
        "auto",
        "Back end of every op: `auto`, `torch`, `cpp`, `cuda` or `compiled`.",
        f"one of {', '.join(BACKENDS)}",
        backend_name,
        BACKENDS,
    ),
    Variable(
        "force_cpu",
        False,
        "Run every op in pure torch. Nothing is compiled or loaded, and a request for a "
        "compiled back end is an error. `jitops build` and `ops.jit` still compile.",
        _A_SWITCH,
        _switch,
    ),
    Variable(
        "strict",
        False,
        "Raise an error where `auto` or `compiled` would warn and fall back to pure torch.",
        _A_SWITCH,
        _switch,
    ),
    Variable(
        "cache_dir",
        None,
        "Folder of the cache of compiled extensions.",
        "an absolute path (~ is allowed)",
        _path,
    ),
    Variable(
        "cache_max_size",
        2 << 30,
        "Largest size of the cache. Beyond it, the least recently used entries are evicted. "
        "Entries in use are kept.",
        "a size like 500M or 2G (powers of 1024)",
        size,
    ),
    Variable(
        "trust_group",
        False,
        "Use a cache folder that its group may write to. You must be a member of that group.",
        _A_SWITCH,
        _switch,
    ),
    Variable(
        "bundle",
        None,
        "A bundle to search before the cache: a file written by `jitops bundle export`, or the "
        "folder that it was unpacked into.",
        "an absolute path (~ is allowed)",
        _path,
    ),
    Variable(
        "build",
        "auto",
        "`never`: no compiler runs. A missing extension is an error where a compiled back end is "
        "requested by name, and pure torch where `auto` or `compiled` may fall back.",
        "auto or never",
        _when_to_build,
        BUILD,
    ),
    Variable(
        "build_timeout",
        1800.0,
        "How many seconds to wait while another process builds the same extension.",
        "a positive number of seconds",
        _seconds,
    ),
    Variable(
        "retry",
        False,
        "Has no effect. Every new process tries a failed build again.",
        _A_SWITCH,
        _switch,
    ),
    Variable(
        "pch",
        True,
        "After a build of text with default headers, precompile `torch/extension.h` in the "
        "background and use it from then on. It takes 0.8 GB of the cache for each set of "
        "flags.",
        _A_SWITCH,
        _switch,
    ),
    Variable(
        "debug",
        False,
        "Build for debuggers: `-O0 -g`, and `-lineinfo` for CUDA.",
        _A_SWITCH,
        _switch,
    ),
    Variable(
        "sanitize",
        (),
        "Build with sanitizers: a list such as `address,undefined`.",
        f"some of {', '.join(SANITIZERS)}, with commas between, thread beside neither address nor "
        f"leak",
        _sanitizers,
    ),
    Variable(
        "progress",
        True,
        "Print on stderr which extension is being compiled.",
        _A_SWITCH,
        _switch,
    ),
)


@functools.lru_cache(maxsize=1)
def settings() -> Settings:
    """The settings in force.

    Raises:
        ConfigError: a variable holds something unusable, or two contradict each other.
    """
    values = {variable.field: _read(variable) for variable in VARIABLES}
    if values["force_cpu"] and values["backend"] in COMPILED:
        raise ConfigError(
            f"JITOPS_FORCE_CPU forces the pure-torch path, but "
            f"JITOPS_BACKEND={values['backend']} asks for a compiled one: unset one of them"
        )
    known = {variable.name for variable in VARIABLES}
    for name in sorted(os.environ):
        if name.startswith("JITOPS_") and name not in known:
            warnings.warn(
                f"{name} is not a variable of jitops; it knows {', '.join(sorted(known))}"
                f"{did_you_mean(name, known)}",
                ConfigWarning,
                stacklevel=2,
            )
    return Settings(**values)


def _read(variable: Variable) -> Any:
    text = os.environ.get(variable.name, "").strip()
    if not text:
        return variable.default
    try:
        return variable.parse(text)
    except ValueError:
        meant = did_you_mean(text, variable.choices)
        raise ConfigError(
            f"{variable.name} must be {variable.must_be}, got {text!r}{meant}"
        ) from None
