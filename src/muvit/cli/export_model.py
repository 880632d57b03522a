"""``muvit export-model``."""

from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from muvit.errors import InputError

_SUFFIXES = {"onnx": ".onnx", "program": ".pt2", "bioimageio": ".zip"}


def add_arguments(parser: ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("model", type=Path, help="folder of a trained model, or of the run that made it")
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        help="file to write: .onnx, .pt2 for a program of torch.export, or .zip for a package of bioimage.io",
    )
    parser.add_argument(
        "--format",
        type=Literal["onnx", "program", "bioimageio"] | None,
        default=None,
        help="what to write; unset, as the suffix of the file says",
    )
    parser.add_argument(
        "--license",
        type=str | None,
        default=None,
        help="of a package: SPDX identifier (default: that of the model card)",
    )
    parser.add_argument("--authors", type=list[str], default=[], help="of a package: names, as in [Ada Lovelace]")
    parser.add_argument(
        "--slide",
        type=Path | None,
        default=None,
        help="of a package: image whose middle becomes its test input and cover (default: random pixels)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there already")


def run(arguments: Namespace) -> None:
    """Export the model, compare its outputs, and print the file with the largest difference."""
    file = arguments.output
    if arguments.format is not None and file.suffix != _SUFFIXES[arguments.format]:
        expected = f"a file ending in {_SUFFIXES[arguments.format]} for format {arguments.format}"
        raise InputError(file, expected=expected, got=f"one ending in {file.suffix!r}")
    given = [name for name in ("license", "authors", "slide") if arguments[name]]
    if file.suffix == _SUFFIXES["bioimageio"]:
        from muvit.data.slides.open import open_slide
        from muvit.models.bioimage import export_package

        difference = export_package(
            arguments.model,
            file,
            license=arguments.license,
            authors=arguments.authors,
            slide=None if arguments.slide is None else open_slide(arguments.slide),
            overwrite=arguments.overwrite,
        )
    elif given:
        raise InputError(f"--{given[0]}", expected="a package of bioimage.io to write", got=str(file))
    else:
        from muvit.models.portable import export_model
        from muvit.models.trained import load_model

        difference = export_model(load_model(arguments.model), file, overwrite=arguments.overwrite)
    print(f"{file}: outputs differ by at most {difference:.1e}")
