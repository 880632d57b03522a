"""Make a file of benchmarks/results: run its commands, and write into it what they measured and how.

    python benchmarks/reproduce.py --list
    python benchmarks/reproduce.py mouse_sections --dry-run --source mouse_brain_sections=PATH
    python benchmarks/reproduce.py mouse_sections --source mouse_brain_sections=PATH

The commands stand in ``benchmarks/reproduce.yaml``. They run in the root of the repository, one after the other, and
write to ``data/`` and ``runs/``. Data that are there are kept. Repeat a call that was stopped: at the same commit what
has ended is not done again, and trainings go on where they stopped; at another commit all begins anew.

Only parts of the file between two comments are replaced: ``run`` (commit, commands, seeds, hardware, date, minutes),
and tables of scores or of what a script prints. Prose stays, with the tables in it that were made otherwise: read it
again after a run.
"""

import argparse
import datetime
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from markdown_table import HEAD, markdown_table, replace_parts

from muvit.plain_yaml import read_yaml

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
LEDGER = ROOT / "runs" / "reproduce.json"
"""The commands that were run: commit, minutes, when each ended, and what it printed."""
PRINTED, BY_HAND = "printed", "by hand"


@dataclass(frozen=True, kw_only=True)
class Result:
    """The making of one file; the words are explained in reproduce.yaml."""

    title: str
    commands: list[str]
    seeds: str
    needs: list[str] = field(default_factory=list)
    tables: dict[str, str] = field(default_factory=dict)
    shows: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All files of the results."""

    sources: dict[str, str]
    data: dict[str, str]
    results: dict[str, Result]
    by_hand: dict[str, str]

    def commands(self, name: str) -> list[str]:
        """Commands of a file, those that make its data first, with ``{source}`` in place of folders of downloads."""
        result = self.results[name]
        return [*(self.data[made] for made in result.needs), *result.commands]


def read_plan(file: Path = ROOT / "benchmarks" / "reproduce.yaml") -> Plan:
    """The plan in a file."""
    content = read_yaml(file, "the plan of the results")
    results = {name: Result(**entry) for name, entry in content.pop("results").items()}
    return Plan(results=results, **content)


def filled(command: str, sources: Mapping[str, str]) -> list[str]:
    """Words of a command; a source that is not given stays as its name in capitals."""
    words = shlex.split(command)
    return [re.sub(r"\{(\w+)\}", lambda found: sources.get(found[1], found[1].upper()), word) for word in words]


def continued(words: Sequence[str], *, is_begun: bool) -> list[str]:
    """The words with what makes the command go on where it stopped, or begin anew.

    Raises:
        SystemExit: a script has left something there, of which it would take over the trained models.
    """
    if "--output" not in words:
        return [*words]
    output = ROOT / words[words.index("--output") + 1]
    if words[0] != "muvit":
        if output.is_dir() and not is_begun:
            sys.exit(f"{output}: is there from an earlier commit; delete it first, to measure this one")
        return [*words]
    if not output.exists():
        return [*words]
    from muvit.training.resume import has_state

    verb = words[1]
    can_resume = verb in ("compare", "demo") or (verb in ("train", "pretrain") and has_state(output))
    return [*words, "--resume" if is_begun and can_resume else "--overwrite"]


def run(name: str, plan: Plan, sources: Mapping[str, str], *, again: bool) -> None:
    """Run what has not been run at this commit, and write the file."""
    result, commit = plan.results[name], current_commit()
    for made in result.needs:
        if not (ROOT / made).exists():
            call(filled(plan.data[made], sources))
    for command in result.commands:
        ledger = json.loads(LEDGER.read_text()) if LEDGER.exists() else {}
        entry = {} if again else ledger.get(command, {})
        is_begun = entry.get("commit") == commit
        if is_begun and entry["ended"]:
            continue
        entry = {"commit": commit, "minutes": entry["minutes"] if is_begun else 0.0, "ended": None, "printed": ""}
        words = continued(filled(command, sources), is_begun=is_begun)
        begin = time.monotonic()
        _record(ledger, command, entry)
        try:
            entry["printed"] = call(words)
            entry["ended"] = datetime.date.today().isoformat()
        finally:
            entry["minutes"] += (time.monotonic() - begin) / 60
            _record(ledger, command, entry)
    ledger = json.loads(LEDGER.read_text())
    replace_parts(RESULTS / f"{name}.md", parts(plan, result, [ledger[command] for command in result.commands]))
    for picture, made in result.files.items():
        if made != BY_HAND:
            shutil.copyfile(ROOT / made, RESULTS / picture)
    print(RESULTS / f"{name}.md")


def _record(ledger: dict[str, Any], command: str, entry: dict[str, Any]) -> None:
    LEDGER.parent.mkdir(exist_ok=True)
    ledger[command] = entry
    LEDGER.write_text(json.dumps(ledger, indent=1))


def call(words: Sequence[str]) -> str:
    """Run a command in the root of the repository, and show what it prints; that is returned.

    Raises:
        SystemExit: it failed.
    """
    print(f"$ {shlex.join(words)}", flush=True)
    programs = {"muvit": [sys.executable, "-m", "muvit"], "python": [sys.executable]}
    lines = []
    with subprocess.Popen([*programs[words[0]], *words[1:]], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    if process.returncode:
        sys.exit(f"ended with {process.returncode}; the same call of this script goes on from here")
    return "".join(lines)


def parts(plan: Plan, result: Result, entries: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The generated parts of a file by name."""
    found = {HEAD: head(result, [plan.data[made] for made in result.needs], entries)}
    for name, folder in result.tables.items():
        found[name] = comparison(json.loads((ROOT / folder / "metrics.json").read_text()))
    for name, file in result.shows.items():
        found[name] = tables_of(entries[-1]["printed"] if file == PRINTED else (ROOT / file).read_text())
    return found


def head(result: Result, made: Sequence[str], entries: Sequence[Mapping[str, Any]]) -> str:
    """Commit, date, minutes, hardware, seeds and commands of a run, those that ``made`` its data first."""
    commits = " and ".join(dict.fromkeys(entry["commit"] for entry in entries))
    commands = "\n".join(shlex.join(filled(command, {})) for command in (*made, *result.commands))
    lines = [
        f"- made by `benchmarks/reproduce.py` at commit {commits}, on {max(entry['ended'] for entry in entries)}, in "
        f"{sum(entry['minutes'] for entry in entries):.1f} minutes",
        f"- {hardware()}",
        f"- seeds: {result.seeds}",
        "",
        "```",
        commands,
        "```",
    ]
    return "\n".join([*lines, *(["", f"Not by these commands: {result.note}."] if result.note else [])])


def hardware() -> str:
    """Processor, cores and GPU, versions of torch and Python."""
    import torch

    file = Path("/proc/cpuinfo")
    models = [line.partition(":")[2].strip() for line in file.read_text().splitlines() if line.startswith("model name")]
    processor = models[0] if models else platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{processor}, {cores} cores, {gpu}; torch {version('torch')}, Python {platform.python_version()}"


def current_commit() -> str:
    """The commit that is checked out, and whether the code differs from it; results may."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    return git("rev-parse", "--short", "HEAD") + (" with changes" if changed else "")


def comparison(metrics: Mapping[str, Any]) -> str:
    """Tables of the scores of a ``muvit compare``: each model and its distance from the first, and each class.

    Intervals are of 95 %: of means over seeds by Student's t where there are several, otherwise over draws of the
    test slides; a difference whose interval holds no 0 is unlikely to be chance.
    """
    rows, dice = [], {}
    for name, one in metrics.items():
        of_seeds = list(one["seeds"].values()) if "seeds" in one else [one]
        first = of_seeds[0]
        shown = first["class_names"][1 if first["has_background"] else 0 :]
        ignored = {first["class_names"][value] for value in first["ignore"] if value < len(first["class_names"])}
        dice[name] = {c: [run["pooled"]["dice"][c] for run in of_seeds] for c in shown if c not in ignored}
        over_slides = first["intervals"].get("mean_dice") if len(first["slides"]) >= 5 else None
        mean = one["mean_dice"] if "seeds" in one else first["pooled"]["mean_dice"]
        rows.append(
            [
                name,
                f"{mean:.3f}",
                _interval(one["mean_dice_interval"] if "seeds" in one else over_slides),
                _interval(one.get("behind_first_by_seed")),
                _interval(one["behind_first"]),
                f"{one['parameters'] / 1e6:.2f}",
                f"{one['training_seconds'] / 60:.1f}",
            ]
        )
    kind = "seeds" if any("seeds" in one for one in metrics.values()) else "slides"
    scores = markdown_table(
        [
            "model",
            "mDSC",
            f"95 % interval, {kind}",
            "behind the first, by seeds",
            "behind the first, by slides",
            "M parameters",
            "minutes of a training",
        ],
        rows,
    )
    classes = dict.fromkeys(c for of_model in dice.values() for c in of_model)
    by_class = [[c, *(_mean(of_model.get(c, [])) for of_model in dice.values())] for c in classes]
    return f"{scores}\n\nDice of each class:\n\n{markdown_table(['class', *dice], by_class)}"


def _interval(bounds: Sequence[float] | None) -> str:
    return "" if bounds is None else f"{bounds[0]:.3f} to {bounds[1]:.3f}"


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{sum(known) / len(known):.3f}" if known else ""


def tables_of(text: str) -> str:
    """The tables and lists of a text, each with the line above it if that ends in a colon."""
    blocks = [block.strip() for block in text.split("\n\n")]
    kept = []
    for number, block in enumerate(blocks):
        is_shown = block.startswith(("|", "- "))
        is_caption = block.endswith(":") and number + 1 < len(blocks) and blocks[number + 1].startswith("|")
        if is_shown or is_caption:
            kept.append(block)
    return "\n\n".join(kept)


def main(argv: Sequence[str] | None = None) -> None:
    """Read the arguments, and list, show or run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="files of benchmarks/results, without .md")
    parser.add_argument("--list", action="store_true", help="list the files, and what must be had first")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, and run none")
    parser.add_argument("--again", action="store_true", help="run what has ended at this commit once more")
    parser.add_argument("--source", action="append", default=[], metavar="NAME=PATH", help="place of a download")
    arguments = parser.parse_args(argv)
    plan = read_plan()
    if arguments.list or not arguments.names:
        width = max(map(len, plan.results))
        print(*(f"{name:<{width}}  {result.title}" for name, result in plan.results.items()), sep="\n")
        print("\nsources:", *(f"  {name}: {what}" for name, what in plan.sources.items()), sep="\n")
        print("\nby hand:", *(f"  {name}: {reason}" for name, reason in plan.by_hand.items()), sep="\n")
        return
    sources = dict(one.partition("=")[::2] for one in arguments.source)
    if unknown := [name for name in arguments.names if name not in plan.results]:
        parser.error(f"expected names that --list shows, got {', '.join(unknown)}")
    if wrong := [name for name in sources if name not in plan.sources]:
        parser.error(f"--source: expected one of {', '.join(plan.sources)}, got {', '.join(wrong)}")
    for name in arguments.names:
        result = plan.results[name]
        left = [plan.data[made] for made in result.needs if not (ROOT / made).exists()] + result.commands
        missing = [s for s in plan.sources if any(f"{{{s}}}" in c for c in left) and s not in sources]
        if arguments.dry_run:
            print(*(shlex.join(filled(command, sources)) for command in plan.commands(name)), sep="\n")
        elif missing:
            parser.error(f"{name}: needs {', '.join(f'--source {s}=PATH ({plan.sources[s]})' for s in missing)}")
        else:
            run(name, plan, sources, again=arguments.again)


if __name__ == "__main__":
    main()
