"""The plan of the results names every file and commands that are understood; parts of files are made as promised."""

import argparse
import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

from muvit.cli import _parser
from muvit.training.resume import FOLDER, LAST

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture
def script(monkeypatch):
    """Imports a script of benchmarks/ by name."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.chdir(ROOT)
    return importlib.import_module


@pytest.fixture
def reproduce(script, monkeypatch, tmp_path):
    """The script, with a repository of its own to write to."""
    module = script("reproduce")
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "RESULTS", tmp_path / "benchmarks" / "results")
    monkeypatch.setattr(module, "LEDGER", tmp_path / "runs" / "reproduce.json")
    monkeypatch.setattr(module, "current_commit", lambda: "abc1234")
    return module


class UnderstoodError(Exception):
    """The arguments of a script were parsed."""


def test_every_file_of_the_results_is_made_by_commands_or_by_hand_with_a_reason(script):
    plan = script("reproduce").read_plan()
    pictures = [picture for result in plan.results.values() for picture in result.files]
    made = sorted([*(f"{name}.md" for name in plan.results), *pictures, *plan.by_hand])
    assert made == sorted({*made, *(file.name for file in RESULTS.iterdir())})  # each once, and none left out
    assert all(len(reason.split()) > 3 for reason in plan.by_hand.values())
    text = (RESULTS / "README.md").read_text()
    assert all(f"`{name}.md`" in text for name in plan.results if (RESULTS / f"{name}.md").exists())


def test_every_command_is_understood_and_finds_its_files(script, monkeypatch):
    reproduce = script("reproduce")
    plan = reproduce.read_plan()
    used = {source for name in plan.results for c in plan.commands(name) for source in re.findall(r"{(\w+)}", c)}
    assert used == set(plan.sources)
    commands = {command for name in plan.results for command in plan.commands(name)}
    assert set(plan.data.values()) < commands

    def understood(parser, *_):
        parse(parser)
        raise UnderstoodError

    parse, parsers = argparse.ArgumentParser.parse_args, {}
    for command in sorted(commands):
        program, *given = reproduce.filled(command, {})
        for word in given:
            assert not word.startswith(("recipes/", "benchmarks/models/", "src/")) or (ROOT / word).exists(), command
        if program == "muvit":
            # what a parser expects depends on the verb and on the kind of the recipe's model; building one takes long
            config = given[given.index("--config") + 1] if "--config" in given else ""
            if (given[0], config) not in parsers:
                parsers[given[0], config] = _parser(given[0], given[1:])
            parsers[given[0], config].parse_args(given)
            continue
        assert program == "python"
        module = script(Path(given[0]).stem)
        monkeypatch.setattr(sys, "argv", given)
        if not hasattr(module, "argparse"):
            assert len(given) == 1, command  # it takes none
            continue
        with monkeypatch.context() as patched, pytest.raises(UnderstoodError):
            patched.setattr(argparse.ArgumentParser, "parse_args", understood)
            module.main()


def test_what_is_compared_in_a_result_is_compared_by_its_commands(script):
    plan = script("reproduce").read_plan()
    for name, result in plan.results.items():
        outputs = [w[w.index("--output") + 1] for w in map(shlex.split, result.commands) if "--output" in w]
        assert {*result.tables.values()} <= set(outputs), name
        folders = {*result.shows.values(), *result.files.values()} - {"printed", "by hand"}
        written = [word for command in result.commands for word in shlex.split(command)]
        assert all(any(place.startswith(word) for word in written) for place in folders), name


def test_only_marked_parts_of_a_file_are_replaced(script, tmp_path):
    module = script("markdown_table")
    file = tmp_path / "some_scores.md"
    module.replace_parts(file, {"scores": "| a |", module.HEAD: "- commit 1"})
    assert file.read_text().splitlines()[0] == "# Some scores"
    assert file.read_text().index("- commit 1") < file.read_text().index("| a |")
    text = file.read_text().replace("<!-- begin scores -->", "before\n<!-- begin scores -->") + "after\n"
    file.write_text(text)
    module.replace_parts(file, {"scores": "| b |", module.HEAD: "- commit 2"})
    assert file.read_text() == text.replace("| a |", "| b |").replace("commit 1", "commit 2")
    file.write_text(text.replace("<!-- end scores -->", ""))
    with pytest.raises(ValueError, match="begin scores --> without"):
        module.replace_parts(file, {"scores": ""})


COUNT = "import pathlib; p = pathlib.Path('count'); p.write_text(p.read_text() + 'x' if p.exists() else 'x')"


def plan_of(reproduce, *commands, **fields):
    result = reproduce.Result(title="t", commands=list(commands), seeds="7", **fields)
    return reproduce.Plan(sources={}, data={"made": "python make.py"}, results={"some": result}, by_hand={})


def test_commands_that_ended_are_not_run_again_unless_asked_or_at_another_commit(reproduce, tmp_path, monkeypatch):
    (tmp_path / "make.py").write_text("open('made', 'w')")
    (tmp_path / "count.py").write_text(COUNT)
    (tmp_path / "last.py").write_text("print('noise\\n\\n| a |\\n| --- |\\n| 1 |'); open('made').close(); open('go')")
    plan = plan_of(
        reproduce, "python count.py", "python last.py", needs=["made"], shows={"shown": "printed"}, note="the moon"
    )
    with pytest.raises(SystemExit, match="the same call of this script goes on from here"):
        reproduce.run("some", plan, {}, again=False)
    (tmp_path / "go").touch()
    (tmp_path / "make.py").unlink()  # data that are there are kept
    reproduce.run("some", plan, {}, again=False)
    assert (tmp_path / "count").read_text() == "x"
    text = (reproduce.RESULTS / "some.md").read_text()
    for line in ("| 1 |", "- seeds: 7", "python make.py\npython count.py\npython last.py", "commands: the moon."):
        assert line in text
    assert re.search(r"at commit abc1234, on \d{4}-\d\d-\d\d, in \d+\.\d minutes", text)
    assert "noise" not in text
    reproduce.run("some", plan, {}, again=True)
    monkeypatch.setattr(reproduce, "current_commit", lambda: "def5678")
    reproduce.run("some", plan, {}, again=False)
    assert (tmp_path / "count").read_text() == "xxx"
    assert "abc1234" not in (reproduce.RESULTS / "some.md").read_text()


def test_trainings_go_on_at_the_same_commit_and_begin_anew_at_another(reproduce, tmp_path):
    def flags(command, *, is_begun):
        return reproduce.continued(shlex.split(command), is_begun=is_begun)[len(shlex.split(command)) :]

    for verb in ("compare", "demo", "train", "pretrain", "study noise a"):
        assert flags(f"muvit {verb} --output runs/a", is_begun=True) == []
    (tmp_path / "runs" / "a").mkdir(parents=True)
    for verb in ("compare", "demo", "train", "pretrain", "study noise a"):
        assert flags(f"muvit {verb} --output runs/a", is_begun=False) == ["--overwrite"]
    assert flags("muvit compare --output runs/a", is_begun=True) == ["--resume"]
    assert flags("muvit study noise a --output runs/a", is_begun=True) == ["--overwrite"]
    assert flags("muvit train --output runs/a", is_begun=True) == ["--overwrite"]  # no epoch has ended
    state = tmp_path / "runs" / "a" / FOLDER / LAST
    state.parent.mkdir()
    state.touch()
    assert flags("muvit train --output runs/a", is_begun=True) == ["--resume"]
    assert flags("python x.py --output runs/a", is_begun=True) == []
    with pytest.raises(SystemExit, match="is there from an earlier commit"):
        flags("python x.py --output runs/a", is_begun=False)


def metrics(dice, interval, behind):
    """Of a model with two seeds, on six slides."""
    one = {
        "class_names": ["background", "a", "b"],
        "has_background": True,
        "ignore": [2],
        "intervals": {"mean_dice": [0.1, 0.9]},
        "slides": dict.fromkeys("123456"),
    }
    seeds = {
        str(s): one | {"pooled": {"dice": {"background": 1.0, "a": d}, "mean_dice": d}} for s, d in enumerate(dice)
    }
    return {
        "parameters": 1_500_000,
        "training_seconds": 90,
        "mean_dice": float(np.mean(dice)),
        "mean_dice_interval": interval,
        "behind_first": None,
        "behind_first_by_seed": behind,
        "seeds": seeds,
    }


def test_scores_of_a_comparison_are_tabled_with_their_intervals(reproduce):
    both = {"first": metrics([0.8, 0.9], [0.75, 0.95], None), "other": metrics([0.4, 0.6], [0.3, 0.7], [0.2, 0.5])}
    table = reproduce.comparison(json.loads(json.dumps(both)))
    assert "| first | 0.850 | 0.750 to 0.950 |  |  | 1.50 | 1.5 |" in table
    assert "| other | 0.500 | 0.300 to 0.700 | 0.200 to 0.500 |  | 1.50 | 1.5 |" in table
    assert "| a | 0.850 | 0.500 |" in table
    assert "| b |" not in table
    single = both["other"]["seeds"]["0"] | {"parameters": 10, "training_seconds": 60, "behind_first": [0.1, 0.2]}
    assert "| other | 0.400 | 0.100 to 0.900 |  | 0.100 to 0.200 | 0.00 | 1.0 |" in reproduce.comparison(
        {"other": single}
    )


def test_displaced_labels_score_less_the_further_they_are_displaced(script):
    module = script("label_noise")
    labels = np.zeros((120, 160), np.uint8)
    labels[20:100, 20:80], labels[20:100, 80:140], labels[60:80, 60:100] = 1, 2, module.UNASSIGNED
    right = module.assigned(labels)
    assert set(np.unique(right)) == {0, 1, 2}
    same, near, far = (module.highest_score([labels], [right], size, 20.0, 0) for size in (0.0, 2.0, 8.0))
    assert same == 1
    assert 1 > near > far > 0.5
    fields = [module.displacement((120, 160), 5.0, 10.0, np.random.default_rng(seed)) for seed in range(20)]
    lengths = np.sqrt(np.mean([(field**2).sum(0).mean() for field in fields]))
    assert abs(lengths - 5) < 0.5
    step = np.abs(np.diff(fields[0], axis=1)).mean()
    assert step < 5 / 10  # smooth over some ten pixels
