"""``muvit completion``."""

from importlib import import_module
from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from muvit.cli.parser import Parser
from muvit.cli.study import STUDIES

_BASH = """\
# completion of the command muvit; made by muvit completion bash
_muvit() {{
    local current="${{COMP_WORDS[COMP_CWORD]}}" words
    if [ "$COMP_CWORD" -eq 1 ]; then
        words="{verbs}"
    else
        case "${{COMP_WORDS[1]}}" in
{cases}
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o default -F _muvit muvit
"""
_ZSH = "autoload -U +X bashcompinit && bashcompinit\n"


def add_arguments(parser: ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("shell", type=Literal["bash", "zsh", "fish"], help="shell to complete in")


def run(arguments: Namespace) -> None:
    """Print the script."""
    words = words_of_verbs()
    print(_fish(words) if arguments.shell == "fish" else _bash(words, is_zsh=arguments.shell == "zsh"), end="")


def words_of_verbs() -> dict[str, list[str]]:
    """Options, and names of studies, that may follow each verb."""
    from muvit.cli import VERBS

    words = {}
    for verb in VERBS:
        parser = Parser(prog=f"muvit {verb}")
        parsers = [parser]
        if verb == "study":
            parsers = [Parser(prog=f"muvit study {name}") for name in STUDIES]
            for study, own in zip(STUDIES.values(), parsers, strict=True):
                study.add_arguments(own)
        else:
            import_module(f"muvit.cli.{verb.replace('-', '_')}").add_arguments(parser)
        options = {option for own in parsers for action in own._actions for option in action.option_strings}
        names = [*STUDIES] if verb == "study" else []
        words[verb] = names + sorted(option for option in options if option.startswith("--") and option[-1] != "+")
    return words


def _bash(words: dict[str, list[str]], *, is_zsh: bool) -> str:
    cases = "\n".join(f'            {verb}) words="{" ".join(options)}" ;;' for verb, options in words.items())
    script = _BASH.format(verbs=" ".join(words), cases=cases)
    return _ZSH + script if is_zsh else script


def _fish(words: dict[str, list[str]]) -> str:
    lines = ["# completion of the command muvit; made by muvit completion fish"]
    lines += [f"complete -c muvit -n __fish_use_subcommand -f -a {verb}" for verb in words]
    for verb, options in words.items():
        after = f"complete -c muvit -n '__fish_seen_subcommand_from {verb}'"
        lines += [f"{after} -l {o[2:]}" if o.startswith("--") else f"{after} -f -a {o}" for o in options]
    return "\n".join(lines) + "\n"
