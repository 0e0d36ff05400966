"""``python -m benchmarks [NAME ...]``: all benches or those named, as tables and as JSON."""

from __future__ import annotations

import argparse
import importlib
import json
import re
from pathlib import Path

import torch

from benchmarks import common

FOLDER = Path(__file__).resolve().parent


def main() -> None:
    known = sorted(path.stem.removeprefix("bench_") for path in FOLDER.glob("bench_*.py"))
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(known))
    parser.add_argument(
        "--name-after-device",
        action="store_true",
        help="write results/<GPU>.json and the tables as .md, instead of results/latest.json",
    )
    options = parser.parse_args()
    for name in options.names:
        if name not in known:
            parser.error(f"no such bench: {name}; there are {', '.join(known)}")
    stem = "latest"
    if options.name_after_device:
        if not torch.cuda.is_available():
            parser.error("--name-after-device: torch sees no GPU")
        stem = re.sub(r"\W+", "-", torch.cuda.get_device_name())
    results = {"machine": common.machine()}
    common.table("Machine", ["", ""], [[key, value] for key, value in results["machine"].items()])
    for name in options.names or known:
        results[name] = importlib.import_module(f"benchmarks.bench_{name}").run()
    folder = FOLDER / "results"
    folder.mkdir(exist_ok=True)
    (folder / f"{stem}.json").write_text(json.dumps(results, indent=1) + "\n")
    if options.name_after_device:
        (folder / f"{stem}.md").write_text("\n".join(common.printed) + "\n")
    print(f"\n{folder / stem}.json")


if __name__ == "__main__":
    main()
