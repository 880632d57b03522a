"""``muvit export-model``."""

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace


def add_arguments(parser: ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("model", type=Path, help="folder of a trained model, or of the run that made it")
    parser.add_argument(
        "--output", type=Path, required=True, help="file to write: .onnx, or .pt2 for a program of torch.export"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there already")


def run(arguments: Namespace) -> None:
    """Export the model, compare its outputs, and print the file with the largest difference."""
    from muvit.models.portable import export_model
    from muvit.models.trained import load_model

    difference = export_model(load_model(arguments.model), arguments.output, overwrite=arguments.overwrite)
    print(f"{arguments.output}: outputs differ by at most {difference:.1e}")
