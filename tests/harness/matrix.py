"""The tables in ``docs/checks.md``: which check runs for which op on which back ends.

``python -m tests.harness.matrix`` writes them anew; a test compares.
"""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

from tests.cuda import emulator as cuda_emulator
from tests.harness.battery import Battery
from tests.harness.op_under_test import EMULATED, TESTS

PAGE = TESTS.parent / "docs/checks.md"
START = "<!-- written by: python -m tests.harness.matrix -->\n"
LETTERS = {"torch": "t", "cpp": "c", cuda_emulator.NAME: "e", "cuda": "g"}


def batteries() -> dict[str, type[Battery]]:
    """The subclass that tests each op, by the op's name."""
    found = {}
    for path in sorted(TESTS.glob("*/test_*.py")):
        if "Battery" not in path.read_text():
            continue
        module = importlib.import_module(f"tests.{path.parent.name}.{path.stem}")
        for one in vars(module).values():
            if inspect.isclass(one) and issubclass(one, Battery) and hasattr(one, "op"):
                found[one.op.name] = one
    return found


def backends(battery: type[Battery], check: str) -> str:
    """The letters of the back ends on which a battery runs a check."""
    function = getattr(battery, check, None)
    if function is None:
        return ""
    names = dict(LETTERS)
    if hasattr(Battery, check) and check not in EMULATED and check not in vars(battery):
        del names[cuda_emulator.NAME]
    conditions = [
        mark.args[0] for mark in getattr(function, "pytestmark", ()) if mark.name == "applies"
    ]
    return "".join(
        letter
        for name, letter in names.items()
        if name in battery.backends and all(condition(battery.op, name) for condition in conditions)
    )


def tables() -> str:
    """A table for each room in Markdown: a row for each check, a column for each op."""
    found = batteries()
    text = ""
    for room in sorted({one.__module__.split(".")[1] for one in found.values()}):
        ops = {name: one for name, one in found.items() if f".{room}." in one.__module__}
        shared = {
            name
            for one in ops.values()
            for base in one.__mro__[1:]
            for name in vars(base)
            if name.startswith("test_")
        }
        rows = [[room, *ops], ["---"] * (1 + len(ops))]
        rows += [
            [check[5:].replace("_", " "), *(backends(one, check) for one in ops.values())]
            for check in sorted(shared)
        ]
        text += "\n" + "".join(f"| {' | '.join(row)} |\n" for row in rows)
    return text


def main() -> None:
    """Write the table into the page."""
    before = PAGE.read_text().partition(START)[0]
    Path(PAGE).write_text(before + START + tables())


if __name__ == "__main__":
    main()
