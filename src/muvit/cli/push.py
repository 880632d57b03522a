"""``muvit push``."""

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from muvit.durable import write_whole
from muvit.models.hub import CARD, push_model


def add_arguments(parser: ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("folder", type=Path, help="model folder, or the folder of the run that made it")
    parser.add_argument("name", type=str, help="organisation/model on huggingface.co; made if it does not exist")
    parser.add_argument(
        "--license",
        type=str | None,
        default=None,
        help=f"licence of the weights, such as cc-by-4.0, to be written into {CARD} first (default: what it says)",
    )
    parser.add_argument("--private", action="store_true", help="let nobody else see a model that is made")
    parser.add_argument("--message", type=str | None, default=None, help="message of the commit (default: a short one)")


def run(arguments: Namespace) -> None:
    """Upload the model, and print its address."""
    from muvit.models.card import with_license
    from muvit.models.folder import model_folder

    folder = model_folder(arguments.folder)
    if arguments.license is not None:
        write_whole(folder / CARD, with_license(folder, arguments.license).encode())
    print(push_model(folder, arguments.name, private=arguments.private, message=arguments.message))
