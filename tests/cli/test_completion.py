import subprocess

import pytest

from muvit.cli import VERBS, main


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    def write(shell, capsys):
        assert main(["completion", shell]) == 0
        file = tmp_path_factory.mktemp("completion") / shell
        file.write_text(capsys.readouterr().out)
        return file

    return write


def test_bash_completes_verbs_options_and_studies(script, capsys):
    file = script("bash", capsys)

    def complete(*words):
        typed = " ".join(f"'{word}'" for word in words)
        command = f"source {file}; COMP_WORDS=({typed}); COMP_CWORD={len(words) - 1}; _muvit; echo ${{COMPREPLY[@]}}"
        return subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True).stdout.split()

    assert complete("muvit", "") == list(VERBS)
    assert complete("muvit", "pre") == [verb for verb in VERBS if verb.startswith("pre")]
    assert complete("muvit", "predict", "--over") == ["--overlap", "--overwrite"]
    assert "--optim.lr" in complete("muvit", "train", "--optim.l")
    assert complete("muvit", "study", "rec") == ["reconstruction"]
    assert complete("muvit", "info", "./a") == []  # left to the shell: names of files


def test_fish_knows_every_verb(script, capsys):
    lines = script("fish", capsys).read_text().splitlines()
    assert [line.rsplit(" ", 1)[1] for line in lines if "__fish_use_subcommand" in line] == list(VERBS)
    assert "complete -c muvit -n '__fish_seen_subcommand_from predict' -l overlap" in lines
