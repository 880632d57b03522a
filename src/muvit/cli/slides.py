"""Several slides under one command: files and folders of them, each with its output, and errors that stop one alone."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse import ArgumentParser, Namespace

from muvit.data.folders import image_files, image_folder
from muvit.data.slides.formats import slide_name
from muvit.errors import InputError, MuViTError

if TYPE_CHECKING:  # imported where they are used, so that the help needs no torch
    from muvit.data.crops.preprocessing import Preprocessing
    from muvit.data.slides.slide import Slide


def add_pixel_size(parser: ArgumentParser) -> None:
    """Add the option that states the pixel size of slides."""
    parser.add_argument(
        "--pixel_size_um",
        type=float | None,
        default=None,
        help="micrometers per pixel of the slides (default: as stored); a model that was trained at a pixel size reads "
        "them at that",
    )


def add_selection(parser: ArgumentParser) -> None:
    """Add the options that choose a part of files with several images, planes, time points or channels."""
    parser.add_argument(
        "--series", type=int | None, default=None, help="number of the image in files that hold several, from 0 on"
    )
    parser.add_argument("--z", type=int | None, default=None, help="number of the plane of stacks (default: all)")
    parser.add_argument("--t", type=int | None, default=None, help="number of the time point (default: all)")
    parser.add_argument(
        "--channels", type=list[str] | None, default=None, help="channels by name or number, such as [DAPI,GFP]"
    )


def selection(arguments: Namespace) -> dict[str, Any]:
    """The arguments of `open_slide` that `add_selection` adds."""
    return {name: arguments[name] for name in ("series", "z", "t", "channels")}


def open_selected(arguments: Namespace, path: Path, *, backend: str = "local") -> "Slide":
    """Open a slide as these arguments say; for workers of Dask, which start elsewhere, by its whole path."""
    from muvit.data.pyramids.remote import as_remote
    from muvit.data.slides.open import open_slide

    place = path.resolve() if backend == "dask" and as_remote(path) is None else path
    return open_slide(place, pixel_size_um=arguments.pixel_size_um, **selection(arguments))


def add_nonfinite(parser: ArgumentParser) -> None:
    """Add the option that says what becomes of pixels that are NaN or infinite."""
    parser.add_argument(
        "--nonfinite",
        type=Literal["error", "ignore"] | None,
        default=None,
        help="pixels that are NaN or infinite: refused, or 0 after normalisation (default: as in training)",
    )


def with_nonfinite(preprocessing: "Preprocessing", arguments: Namespace) -> "Preprocessing":
    """The preprocessing of a model under the option that `add_nonfinite` adds."""
    if arguments.nonfinite is None:
        return preprocessing
    return replace(preprocessing, nonfinite=arguments.nonfinite)


def slide_targets(paths: Sequence[Path], output: Path, suffix: str) -> dict[Path, Path]:
    """The slide that belongs to each output ``<output>/<slide><suffix>``.

    Args:
        paths: slides, or folders of them.
        output: folder of all outputs.
        suffix: of the outputs, such as ``.ome.zarr``.

    Raises:
        InputError: two slides have one name, or a folder of slides would receive the outputs.
        ReadError: a folder holds no slide.
    """
    for path in paths:
        is_folder = image_files([path]) != [path]
        if is_folder and output.resolve() in (path.resolve(), image_folder(path).resolve()):
            raise InputError("--output", expected="another folder than that of the slides", got=output)
    targets: dict[Path, Path] = {}
    for file in image_files(paths):
        target = output / f"{slide_name(file)}{suffix}"
        if target in targets:
            raise InputError("slide", expected="images of different names", got=f"{targets[target]} and {file}")
        targets[target] = file
    return targets


def file_or_folder_targets(paths: Sequence[Path], output: Path, suffix: str) -> dict[Path, Path]:
    """The slide that belongs to each output: as `slide_targets`, or ``output`` itself if it has the suffix.

    Raises:
        InputError: ``output`` has the suffix, but there are several slides; or as `slide_targets`.
        ReadError: a folder holds no slide.
    """
    if output.suffix != suffix:
        return slide_targets(paths, output, suffix)
    files = image_files(paths)
    if len(files) > 1:
        raise InputError("--output", expected="a folder, for several images", got=output)
    return {output: files[0]}


class SlideFailures:
    """Slides that failed while the work on others goes on. An error of the only slide is raised as it is.

    Args:
        num_slides: all that there are.

    Attributes:
        names: slides that failed.
    """

    def __init__(self, num_slides: int) -> None:
        self.num_slides = num_slides
        self.names: list[str] = []

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Work on one slide, whose error is printed and noted."""
        try:
            yield
        except (MuViTError, OSError) as error:
            if self.num_slides == 1:
                raise
            self.names.append(name)
            print(f"muvit: {error}", *getattr(error, "__notes__", ()), file=sys.stderr)

    def require_none(self, expected: str, *, hint: str = "") -> None:
        """End the command if a slide failed.

        Args:
            expected: what should have become of the slides, such as ``labelled``.
            hint: what to do, a full sentence.

        Raises:
            InputError: slides failed; names them.
        """
        if self.names:
            got = f"{len(self.names)} that failed: {', '.join(self.names)}"
            raise InputError("slides", expected=f"{self.num_slides} {expected}", got=got, hint=hint)
