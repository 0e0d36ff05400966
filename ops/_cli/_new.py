"""``python -m ops new``: write the files of a new op, from a small op that works.

A folder of ``templates`` holds that op: its files, and the lines that it adds to the lists. The new
op is the same with another name.
"""

from __future__ import annotations

import argparse
import keyword
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import ops
from ops._errors import ArgumentError, JitopsError

_STEM = "smooth_distance"  # of the op in the templates
# The place of its line in each list: a heading, below which it comes last. Imports are sorted.
_HEADINGS = {"README.md": "## Losses", "CHANGELOG.md": "### Added"}
_STUB = "ops/__init__.pyi"

# Reserved in C++ and not in Python: the op's name is a namespace too.
_RESERVED = """
    alignas alignof asm auto bool case catch char compl const consteval constexpr constinit
    decltype default delete do double enum explicit export extern float friend goto inline int long
    mutable namespace new noexcept nullptr operator private protected public register requires
    short signed sizeof static struct switch template this thread_local throw typedef typeid
    typename union unsigned using virtual void volatile wchar_t xor std main
"""


def add_to(commands: Any) -> None:
    """Add the parser of the command."""
    parser = commands.add_parser(
        "new",
        help="write the files of a new loss, in a checkout of jitops",
        description="Write the files of a new loss, in a checkout of jitops. They hold a small "
        "loss of that name, which passes all tests as it is. Add the loss to the public names, the "
        "README, the changelog and the tables of checks.",
    )
    parser.add_argument("name", metavar="NAME", help="its name in snake_case, as in focal_loss")
    parser.add_argument(
        "--torch-only", action="store_true", help="without kernels in C++ and CUDA, and no bench"
    )
    parser.set_defaults(run=main)


def main(options: argparse.Namespace) -> None:
    """Write the files and the lines, and print what changed."""
    root = _checkout()
    template = root / "templates" / ("torch_only" if options.torch_only else "compiled")
    name = _checked(options.name, template, root)
    new = {
        root / _renamed(str(path), name): _renamed(text, name)
        for path, text in _files(template / "files")
    }
    for path in new:
        if path.exists():
            raise ArgumentError(f"NAME must be the name of no op, got {name!r}: {path} exists")
    lists = {
        root / path: _with_lines(root / path, str(path), _renamed(text, name), name)
        for path, text in _files(template / "lines")
    }
    _write({**new, **lists})
    for path in new:
        print(f"wrote {path.relative_to(root)}")
    for path in lists:
        print(f"added a line to {path.relative_to(root)}")
    matrix = subprocess.run([sys.executable, "-m", "tests.harness.matrix"], cwd=root, check=False)
    if matrix.returncode:
        raise JitopsError("docs/checks.md lacks the op: run python -m tests.harness.matrix")
    print(f"added the op to docs/checks.md\ntest it: python -m pytest tests/losses/test_{name}.py")


def _checkout() -> Path:
    """The folder of the checkout.

    Raises:
        JitopsError: jitops is installed without its templates and tests.
    """
    root = Path(ops.__file__).resolve().parent.parent
    if not (root / "templates" / "compiled").is_dir() or not (root / "tests").is_dir():
        raise JitopsError(f"`new` needs a checkout of jitops, and ops was imported from {root}")
    return root


def _files(folder: Path) -> list[tuple[Path, str]]:
    """The text files below a folder, each with its path from there."""
    paths = (path for path in sorted(folder.rglob("*")) if path.suffix != ".pyc" and path.is_file())
    return [(path.relative_to(folder), path.read_text(encoding="utf-8")) for path in paths]


def _class_of(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("_"))


def _renamed(text: str, name: str) -> str:
    return text.replace(_STEM, name).replace(_class_of(_STEM), _class_of(name))


def _checked(name: str, template: Path, root: Path) -> str:
    """``name``, which can be the name of an op.

    Raises:
        ArgumentError: it is not in snake_case, or taken.
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name):
        raise ArgumentError(f"NAME must be in snake_case, as in focal_loss, got {name!r}")
    if keyword.iskeyword(name) or name in _RESERVED.split():
        raise ArgumentError(f"NAME must not be a word of Python or C++, got {name!r}")
    both = {name, _class_of(name)}
    if not both.isdisjoint(dir(ops)) or (root / "ops" / name).exists():
        raise ArgumentError(f"NAME must be new, got {name!r}, of which jitops has one")
    # Else the new op would shadow a helper, or the loader would seem to know the op.
    others = [template, root / "ops" / "jit", root / "cuda_src" / "common"]
    texts = (text for folder in others for _, text in _files(folder))
    if not both.isdisjoint(re.findall(r"\w+", _renamed("\n".join(texts), "_"))):
        raise ArgumentError(f"NAME must not be a word of the code around an op, got {name!r}")
    return name


def _with_lines(path: Path, file: str, lines: str, name: str) -> str:
    """The text of a list with lines for the new op."""
    text = path.read_text(encoding="utf-8")
    if file == _STUB:
        later = (
            found.start()
            for found in re.finditer(r"^from \.losses\.(\w+) import", text, re.MULTILINE)
            if found[1] > name
        )
        place = next(later, text.find("\n__version__"))
    else:
        section = re.search(
            rf"^{_HEADINGS[file]}\n(.*?)\s*(?=\n#|\Z)", text, re.MULTILINE | re.DOTALL
        )
        place = section.end(1) + 1 if section else -1
    if place < 0:
        raise JitopsError(f"{path} has no place for the op: the template expects another text")
    return text[:place] + lines + text[place:]


def _write(texts: dict[Path, str]) -> None:
    """Write all files, or none."""
    before = {path: path.read_bytes() if path.exists() else None for path in texts}
    try:
        for path, text in texts.items():
            path.write_text(text, encoding="utf-8")
    except BaseException:
        for path, content in before.items():
            if content is None:
                path.unlink(missing_ok=True)
            else:
                path.write_bytes(content)
        raise
