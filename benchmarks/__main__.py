"""``python -m benchmarks [NAME ...]``: all benches or those named, as tables and as JSON."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

from benchmarks.common import machine, table

FOLDER = Path(__file__).resolve().parent


def main() -> None:
    known = sorted(path.stem.removeprefix("bench_") for path in FOLDER.glob("bench_*.py"))
    names = sys.argv[1:] or known
    for name in names:
        if name not in known:
            raise SystemExit(f"no such bench: {name}; there are {', '.join(known)}")
    results = {"machine": machine()}
    table("Machine", ["", ""], [[key, value] for key, value in results["machine"].items()])
    for name in names:
        results[name] = importlib.import_module(f"benchmarks.bench_{name}").run()
    path = FOLDER / "results" / "latest.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"\n{path}")


if __name__ == "__main__":
    main()
