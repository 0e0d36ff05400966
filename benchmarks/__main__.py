"""``python -m benchmarks [NAME ...]``: run all or the named benches; print tables, write JSON."""

from __future__ import annotations

import argparse
import importlib
import json
import traceback
from pathlib import Path

from benchmarks import common

HERE = Path(__file__).resolve().parent


def main() -> None:
    known = common.benches()
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(known))
    parser.add_argument("--device", choices=common.COMPILED, help="measure only this kind")
    parser.add_argument(
        "--folder",
        type=Path,
        default=HERE / "results" / "latest",
        help="folder for NAME.json and NAME.md (default: benchmarks/results/latest)",
    )
    options = parser.parse_args()
    for name in options.names:
        if name not in known:
            parser.error(f"NAME must be among {', '.join(known)}, got {name!r}")
    common.only = options.device
    options.folder.mkdir(parents=True, exist_ok=True)

    def keep(name: str, figures: object) -> None:
        """Write the results of a bench at once, so that they survive if a later one is stopped."""
        (options.folder / f"{name}.json").write_text(json.dumps(figures, indent=1) + "\n")
        (options.folder / f"{name}.md").write_text("\n".join(common.printed).lstrip() + "\n")
        common.printed.clear()

    machine = common.machine()
    common.table("Machine", ["", ""], [[key, value] for key, value in machine.items()])
    keep("machine", machine)
    failed = []
    for name in options.names or known:
        try:
            figures = importlib.import_module(known[name]).run()
        except Exception:
            traceback.print_exc()
            failed.append(name)
        else:
            keep(name, figures)
    print(f"\n{options.folder}")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
