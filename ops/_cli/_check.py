"""``jitops check``: check the gradients of the ops, or of any function, on every back end."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import json
import os
import pkgutil
import sys
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import ops
from ops import arrays, layers, losses
from ops._cli import _build, _inputs
from ops._core.checks import Sample
from ops._errors import did_you_mean
from ops.gradcheck import _plot


def modules() -> dict[str, Any]:
    """The modules of all ops that have samples to check, by name."""
    found = {}
    for room in (losses, layers, arrays):
        for module in pkgutil.iter_modules(room.__path__, f"{room.__name__}."):
            name = module.name.rpartition(".")[2]
            if not name.startswith("_"):
                found[name] = importlib.import_module(module.name)
    return {name: module for name, module in found.items() if hasattr(module, "samples")}


def add_to(commands: Any) -> None:
    """Add the parser of the command."""
    parser = commands.add_parser(
        "check",
        help="check the gradients of the ops, or of a function of yours",
        description="Check gradients on every back end that can run: against finite differences, "
        "in second order, in forward mode, in every layout and dtype. The exit status is 1 if one "
        "is wrong.",
    )
    parser.set_defaults(run=main)
    parser.add_argument(
        "targets",
        nargs="*",
        metavar="TARGET",
        help="an op, or a function or module of yours as MODULE:NAME or FILE.py:NAME "
        "(default: all ops)",
    )
    parser.add_argument(
        "--input",
        dest="inputs",
        action="append",
        type=_inputs.parse,
        metavar="SHAPE",
        help=_inputs.HELP,
    )
    parser.add_argument(
        "--positive",
        action="store_true",
        help="fill each --input without a range with positive numbers",
    )
    parser.add_argument(
        "--backends", metavar="A,B", help="torch, cpp, cuda (default: each that runs here)"
    )
    parser.add_argument(
        "--order",
        type=_build.positive,
        default=2,
        help="order of the highest derivatives to check (default: 2)",
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    parser.add_argument(
        "--verbose", action="store_true", help="print the whole table even if all gradients pass"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the reports to FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the reports into FILE")


def main(options: argparse.Namespace) -> int:
    """Check, print each report, and return the exit status."""
    for name, file in (("--json", options.json), ("--plot", options.plot)):
        if file and not file.absolute().parent.is_dir():
            raise ops.ArgumentError(f"{name} must be a file in a folder that exists, got {file}")
    if options.plot:
        _plot.check_format("--plot", options.plot)
    reports, missing = [], []
    samples = list(_samples(options))
    for title, function, arguments in samples:
        torch.manual_seed(options.seed)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ops.GradientCheckWarning)  # it is in the report
                report = ops.check_gradients(
                    function,
                    *arguments,
                    backends=options.backends.split(",") if options.backends else None,
                    seed=options.seed,
                    name=title,
                    order=options.order,
                )
        except ops.DependencyError as error:
            missing.append(title)
            print(f"{title}: not checked: {error}", flush=True)
            continue
        except Exception as error:
            if _is_ours(traceback.extract_tb(error.__traceback__)[-1]):
                raise
            raise _blamed(title, error) from None
        long = options.verbose or len(samples) == 1 or not report.ok or report.doubts
        print(report if long else report.summary(), flush=True)
        reports.append(report)
    failed = [report.function for report in reports if not report.ok]
    if len(samples) > 1:
        lacking = f", {len(missing)} not checked" if missing else ""
        print(f"{len(reports) - len(failed)} of {len(samples)} ok{lacking}")
    if options.json:
        told = [report.to_dict() for report in reports]
        options.json.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    if options.plot:
        for number, report in enumerate(reports):
            some = f"-{number}" if len(reports) > 1 else ""
            report.plot(options.plot.with_stem(options.plot.stem + some))
    return 1 if failed or missing else 0


def _samples(options: argparse.Namespace) -> Iterator[Sample]:
    known = modules()
    for target in options.targets or known:
        torch.manual_seed(options.seed)
        if ":" not in target:
            if target not in known:
                raise ops.ArgumentError(
                    f"TARGET must be MODULE:NAME, FILE.py:NAME or one of {', '.join(known)}, "
                    f"got {target!r}{did_you_mean(target, known)}"
                )
            for title, function, arguments in known[target].samples():
                yield f"{target}, {title}" if title else target, function, arguments
        elif not options.inputs:
            raise ops.ArgumentError(
                f"--input must give the shape of each argument of {target}, as in --input 3,4"
            )
        else:
            inputs = _inputs.draw(options.inputs, options.positive)
            try:
                function = _function(target)
            except ops.JitopsError:
                raise
            except Exception as error:  # of the user's module
                raise _blamed(target, error) from None
            try:
                inspect.signature(function).bind(*inputs)
            except ValueError:
                pass  # a built-in function without a signature
            except TypeError as error:
                raise ops.ArgumentError(
                    f"--input must be given once for each argument of {target}, got "
                    f"{len(inputs)}: {error}"
                ) from None
            yield target, function, inputs


def _blamed(target: str, error: Exception) -> ops.ArgumentError:
    """An error that shows the exception of a user's code, without the frames that called it."""
    frames = [one for one in traceback.extract_tb(error.__traceback__) if not _is_ours(one)]
    lines = [*traceback.format_list(frames), *traceback.format_exception_only(error)]
    return ops.ArgumentError(f"{target} raises an error:\n{''.join(lines).rstrip()}")


def _is_ours(frame: traceback.FrameSummary) -> bool:
    calling = (str(Path(ops.__file__).parent), str(importlib.__file__), "<frozen importlib")
    return frame.filename.startswith(calling)


def _function(target: str) -> Any:
    """Import the object that ``MODULE:NAME`` or ``FILE.py:NAME`` names."""
    module_name, _, path = target.rpartition(":")
    if module_name.endswith(".py"):
        spec = importlib.util.spec_from_file_location(Path(module_name).stem, module_name)
        if spec is None or spec.loader is None or not Path(module_name).is_file():
            raise ops.ArgumentError(f"TARGET must name a file that exists, got {module_name!r}")
        value: Any = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = value
        spec.loader.exec_module(value)
    else:
        sys.path.insert(0, os.getcwd())  # as `python -m` does
        try:
            value = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name != module_name:
                raise
            raise ops.ArgumentError(f"TARGET must name a module, got {module_name!r}") from None
    for name in path.split("."):
        if not hasattr(value, name):
            raise ops.ArgumentError(f"TARGET must name an object in {module_name}, got {path!r}")
        value = getattr(value, name)
    if isinstance(value, type) or not callable(value):
        raise ops.ArgumentError(
            f"TARGET must name a function or a module object, got {path!r}, "
            f"{'a class' if isinstance(value, type) else f'of {type(value).__name__}'}"
        )
    return value
