"""``jitops doctor``: find missing or broken tools, and say how to mend them."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

from ops import _config
from ops._cli._doctor_of import _cache, _machine, _tools
from ops._cli._doctor_of._finding import BAD, GOOD, NOTE, Finding
from ops._core import dispatch, selection
from ops._core.selection import DEVICE_OF, MAY_FALL_BACK
from ops._errors import JitopsError
from ops.jit import _admin


def add_to(commands: Any) -> None:
    """Add the parser of the command."""
    parser = commands.add_parser(
        "doctor",
        help="find missing or broken tools, and say how to mend them",
        description="Examine torch, CUDA, compilers, the cache and each op. The exit status is 1 "
        "if the requested back end (JITOPS_BACKEND) would not work.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, as for a bug report")
    parser.set_defaults(run=main)


def main(options: argparse.Namespace) -> int:
    """Print the report; the exit status is 0 if the requested back end would work."""
    sections = {
        "machine": list(_machine.machine()),
        "tools": list(_tools.tools()),
        "cache": list(_cache.cache()),
    }
    broken = [one for one in sections["tools"] + sections["cache"] if one.status == BAD]
    sections["ops"] = [
        _state(op, backend, [one for one in broken if backend in one.blocks])
        for op in dispatch.known().values()
        for backend in DEVICE_OF
    ]
    sections["variables"] = list(_machine.variables())
    works, verdict = _verdict(sections["ops"])
    if options.json:
        told = {name: [asdict(finding) for finding in found] for name, found in sections.items()}
        print(json.dumps({"ok": works, "verdict": verdict, **told}, indent=1))
    else:
        _print(sections)
        print(f"\n{verdict}")
    return 0 if works else 1


def _state(op: dispatch.Op, backend: str, broken: list[Finding]) -> Finding:
    """The state of an extension: cached, would be built, or the reason why neither.

    ``broken`` lists the tools that a build with this back end needs and lacks.
    """
    topic = f"{op.name} {backend}"
    try:
        problem = op.problem_with(backend)
        extension = op.extension(backend)
        library = extension.find() if extension else None
        if library:
            blocks = (backend,) if problem else ()
            return Finding(topic, f"cached: {library}", NOTE if problem else GOOD, problem, blocks)
        if problem or extension is None:
            return Finding(topic, "cannot run", NOTE, problem, (backend,))
        if broken:
            names = ", ".join(one.topic for one in broken)
            return Finding(topic, "cannot be built", NOTE, f"see {names}, above", (backend,))
        failure = _admin.last_failure(extension.effective_spec)
        if failure:
            return Finding(topic, "failed to build when last tried", BAD, failure, (backend,))
        reason = _admin.sentence(extension.effective_spec)
        if _config.settings().force_cpu:
            return Finding(topic, f"not built, and no call builds it (JITOPS_FORCE_CPU): {reason}")
        return Finding(topic, f"would be built: {reason}")
    except JitopsError as error:
        return Finding(topic, "cannot run", BAD, str(error), (backend,))


def _verdict(states: list[Finding]) -> tuple[bool, str]:
    """Whether the requested back end works, and the sentence that says so."""
    settings = _config.settings()
    wanted = "torch" if settings.force_cpu else selection.requested() or settings.backend
    compiled = {wanted} & set(DEVICE_OF)
    if wanted == "compiled":
        compiled.add("cpp")
    if wanted in MAY_FALL_BACK and selection.has_gpu():
        compiled.add("cuda")
    blocked = ", ".join(state.topic for state in states if compiled & set(state.blocks))
    if not blocked:
        needs = "" if compiled else " The pure-torch path needs none of the above."
        return True, f"Back end {wanted}: works.{needs}"
    if wanted in MAY_FALL_BACK and not settings.strict:
        return True, f"Back end {wanted}: works, on the pure-torch path because it lacks {blocked}."
    return False, f"Back end {wanted}: does NOT work for {blocked}; see above."


def _print(sections: dict[str, list[Finding]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=None if Console().is_terminal else 160, highlight=False)
    styles = {GOOD: "green", NOTE: "yellow", BAD: "bold red"}
    for name, findings in sections.items():
        if not findings:
            continue
        console.print(f"\n{name}", style="bold")
        table = Table.grid(padding=(0, 2))
        for finding in findings:
            text = Text(finding.found, overflow="fold")
            if finding.fix and finding.status != GOOD:
                text.append(f"\n→ {finding.fix}", style=styles[finding.status])
            table.add_row(
                Text(f"  {finding.status}", style=styles[finding.status]), finding.topic, text
            )
        console.print(table)
