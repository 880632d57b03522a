"""The README and the documentation are true: their commands and snippets run as written, their links lead somewhere."""

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from pydoc import locate
from tempfile import NamedTemporaryFile, TemporaryFile
from types import ModuleType
from typing import NamedTuple

import matplotlib
import numpy as np
import pytest
import yaml
from old_folders import old_mae
from PIL import Image

import muvit
from muvit.cli import main


def navigated(entry: object) -> Iterator[str]:
    """The pages of a part of the navigation, in its order."""
    if isinstance(entry, str):
        yield entry
    else:
        for below in entry.values() if isinstance(entry, dict) else entry:
            yield from navigated(below)


ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
NAVIGATION = tomllib.loads((ROOT / "zensical.toml").read_text())["project"]["nav"]
# as a reader meets them: every page goes on with the files that the README's commands made
PAGES = [README, *(DOCS / page for page in navigated(NAVIGATION)), ROOT / "CONTRIBUTING.md"]
RUN = {"bash", "python", "console"}
SHOWN = {"text", "bibtex"}
PROGRESS = re.compile(r"\[\d\d:\d\d.*, .*/\w+\]")
NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e-\d+)?")
SEAMS = re.compile(r"(?:; |\S+: )labels change [\d.]+ times .*")
"""A measurement, which hangs on the last digits of a model's weights."""
MUVIT = """
muvit() {
  local code
  echo "${*@Q}" >&"$ASK"
  read -r code <&"$ANSWERED"
  cat "$SAID"
  return "$code"
}
"""


class Snippet(NamedTuple):
    """A fenced block of a page."""

    place: str
    language: str
    code: str
    excuse: str
    """Why it is not run; empty if it is."""
    is_long: bool
    """It is run by the test marked long alone."""

    @property
    def is_run(self) -> bool:
        """Whether any test runs it."""
        return not self.excuse and self.language in RUN


def snippets(page: Path) -> list[Snippet]:
    fence = re.compile(
        r"(?:<!-- (?:not run: (?P<excuse>.+?)|long: (?P<long>.+?)) -->\n)?^```(?P<language>\w*).*?\n(?P<code>.*?)^```$",
        re.M | re.S,
    )
    text = page.read_text()
    return [
        Snippet(
            f"{page.relative_to(ROOT)}:{text.count(chr(10), 0, match.start('code'))}",
            match["language"],
            match["code"],
            match["excuse"] or "",
            bool(match["long"]),
        )
        for match in fence.finditer(text)
    ]


@pytest.fixture
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a reader has before the first command: own pictures, names for the values of their masks, an old model."""
    folder = tmp_path_factory.mktemp("reader")
    rng = np.random.default_rng(0)
    for kind, high in (("photos", 256), ("masks", 3)):
        (folder / kind).mkdir()
        for name in "ab":
            Image.fromarray(rng.integers(0, high, (300, 400), dtype=np.uint8)).save(folder / kind / f"{name}.png")
    (folder / "classes.json").write_text(json.dumps({"0": "background", "1": "tumour", "2": "stroma"}))
    old_mae(folder / "release_0.1.0")
    return folder


def test_commands_and_snippets_run_as_written(workspace: Path, monkeypatch, capfd) -> None:
    monkeypatch.chdir(workspace)
    for page in PAGES:
        run([snippet for snippet in snippets(page) if not snippet.is_long], workspace, capfd)


@pytest.mark.long
def test_long_snippets_run_as_written(workspace: Path, monkeypatch, capfd) -> None:
    monkeypatch.chdir(workspace)
    run(snippets(README), workspace, capfd)
    long = [snippet for page in PAGES for snippet in snippets(page) if snippet.is_long]
    assert long
    run(long, workspace, capfd)


def run(page: list[Snippet], folder: Path, capfd) -> None:
    names: dict[str, object] = {"__name__": "page"}
    for snippet in page:
        if snippet.is_run and snippet.language == "bash":
            run_shell(snippet, folder)
        elif snippet.is_run and snippet.language == "console":
            run_console(snippet, capfd)
        elif snippet.is_run:
            exec(compile(snippet.code, snippet.place, "exec"), names)


def run_shell(snippet: Snippet, folder: Path) -> None:
    """Bash runs the snippet, and this process what it calls ``muvit``: to start Python each time takes much longer."""
    asked, ask = os.pipe()
    answered, answer = os.pipe()
    with NamedTemporaryFile("w+") as said, TemporaryFile("w+") as log:
        shell = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", MUVIT + snippet.code],
            cwd=folder,
            env=os.environ | {"ASK": str(ask), "ANSWERED": str(answered), "SAID": said.name},
            pass_fds=(ask, answered),
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        os.close(ask)
        os.close(answered)
        with os.fdopen(asked) as commands, os.fdopen(answer, "w", buffering=1) as answers:
            for command in commands:
                with Path(said.name).open("w") as stream, redirect_stdout(stream):
                    code = main(shlex.split(command))
                answers.write(f"{code}\n")
        code = shell.wait()
        log.seek(0)
        assert code == 0, f"{snippet.place}\n{log.read()}"


def run_console(snippet: Snippet, capfd) -> None:
    """Commands after ``$``, each with the very output that the page shows."""
    for session in re.split(r"^\$ ", snippet.code, flags=re.M)[1:]:
        command, _, shown = session.partition("\n")
        program, *arguments = shlex.split(command)
        assert program == "muvit", f"{snippet.place}: only muvit can be shown with its output, not {program}"
        capfd.readouterr()
        main(arguments)
        captured = capfd.readouterr()
        lines = re.split(r"[\r\n]+", captured.out + captured.err)
        said = [SEAMS.sub("", line) for line in lines if not PROGRESS.search(line)]
        assert "\n".join(filter(None, said)).strip() == shown.strip(), f"{snippet.place}: {command}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_are_run_or_say_why_not(page: Path) -> None:
    text = page.read_text()
    found = snippets(page)
    assert len(found) == len(re.findall(r"^```", text, re.M)) // 2, "a fenced block is not recognised"
    marks = sum(bool(s.excuse) or s.is_long for s in found)
    assert len(re.findall("<!-- (?:not run|long)", text)) == marks, "an excuse does not stand before a block"
    silent = [s.place for s in found if s.language not in RUN | SHOWN and not s.excuse]
    assert not silent, "say what language it is, or why it is not run"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", prose):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_every_page_is_in_the_navigation() -> None:
    assert set(DOCS.rglob("*.md")) == {page for page in PAGES if page.is_relative_to(DOCS)}


def test_architecture_describes_what_is_there() -> None:
    source = ROOT / "src"
    named = set(re.findall(r"`(muvit(?:\.\w+)+)`", (DOCS / "architecture.md").read_text()))
    found = {".".join(f.relative_to(source).with_suffix("").parts) for f in (source / "muvit").rglob("*.py")}
    found = {name.removesuffix(".__init__") for name in found}
    assert not named - found, "docs/architecture.md describes what is not there"
    assert not {name for name in found if name.count(".") == 1} - named, "describe them in docs/architecture.md"


def test_equations_name_code_that_exists() -> None:
    named = re.findall(r"`(muvit\.[\w.]+)`", (DOCS / "reference" / "equations.md").read_text())
    assert len(named) > 40
    for name in named:
        found = locate(name)
        assert found is not None, f"docs/reference/equations.md names {name}"
        assert not isinstance(found, ModuleType), f"{name} is a module, which computes no formula"


def test_figures_are_what_their_script_draws(tmp_path: Path) -> None:
    runpy.run_path(str(DOCS / "figures.py"))["draw"](tmp_path)
    figures = sorted(tmp_path.iterdir())
    pages = "".join(page.read_text() for page in PAGES)
    assert figures and all(f"images/{figure.name}" in pages for figure in figures)
    for figure in figures:
        drawn, kept = figure.read_text(), (DOCS / "images" / figure.name).read_text()
        if f"Matplotlib v{matplotlib.__version__}," in kept:  # another version draws other digits
            assert drawn == kept, "run docs/figures.py"


def test_settings_by_purpose_exist(capsys) -> None:
    page = (DOCS / "guide" / "settings.md").read_text()
    section = page[page.index("## By purpose") : page.index("## Recipe")]
    options = {f"--{name}" for name in re.findall(r"`((?:data|model|loss|optim|run|init)\.[\w.]+)`", section)}
    for verb in ("train", "predict"):
        assert main([verb, "--help"]) == 0
    known = set(re.findall(r"^  (--[\w.]+)", capsys.readouterr().out, re.M))
    assert len(options) > 40
    assert options | set(re.findall(r"`(--\w+)", section)) - {"--levels"} <= known, "one of them is no option"


def test_numbers_of_the_benchmarks_page_stand_in_the_results_that_it_links() -> None:
    page = DOCS / "reference" / "benchmarks.md"
    rows = re.findall(r"^\|[^|]+\|([^|]+)\| \[\w+\]\((results/\w+\.md)\) \|$", page.read_text(), re.M)
    assert len(rows) > 20
    for answer, results in rows:
        measured = set(re.findall(NUMBER, (page.parent / results).read_text()))
        assert set(re.findall(NUMBER, answer)) <= measured, f"{results}: {answer}"


def test_reference_lists_the_public_names_with_their_homes() -> None:
    text = (DOCS / "api" / "public.md").read_text()
    named = set(re.findall(r"`(\w+)`(?:\]|, |  *\|)", text))
    assert named - {"fit"} == {*muvit.__all__} - {"__version__"}
    for name, home in re.findall(r"\[`(\w+)`\]\[muvit\.([\w.]+)\]", text):
        assert home == f"{muvit._HOME[name]}.{name}"


def test_version_is_stated_alike_everywhere() -> None:
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == muvit.__version__
    latest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert latest and latest[1] == muvit.__version__


@pytest.mark.long
@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda file: file.stem)
def test_examples_run(example: Path, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, example, "--output", tmp_path], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert any(tmp_path.iterdir()), "an example leaves a result"
