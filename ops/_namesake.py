"""Another project that installs a package ``ops``: each overwrites files of the other."""

from __future__ import annotations

import sys

from ops._errors import DependencyError

FIX = (
    "give each its own environment, or run `pip uninstall ops` and then "
    "`pip install --force-reinstall --no-deps jitops`"
)


def replaced() -> str | None:
    """The sentence about an ``ops/__init__.py`` that is another project's, or gone with it."""
    package = sys.modules["ops"]
    if "_IS_JITOPS" in vars(package):
        return None
    where = getattr(package, "__file__", None) or f"none in {', '.join(package.__path__)}"
    return f"another project has replaced or removed ops/__init__.py of jitops ({where}): {FIX}"


def check() -> None:
    """Raise an error if another project has replaced this one's ``ops/__init__.py``."""
    sentence = replaced()
    if sentence:
        raise DependencyError(sentence)


def others() -> list[str]:
    """The other installed projects that have a package ``ops``."""
    import importlib.metadata

    names = set(importlib.metadata.packages_distributions().get("ops", ())) - {"jitops"}
    return [f"{name} {importlib.metadata.version(name)}" for name in sorted(names)]
