"""Conversion of a downloaded data set into folders to train from; an interrupted run can be resumed."""

import csv
import io
import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

from muvit.data.pyramids.convert import convert_image
from muvit.data.pyramids.ngff import Color, Kind
from muvit.data.pyramids.spec import check_spec
from muvit.data.sources.source import SPLITS, Item, Source, check_source
from muvit.durable import write_whole
from muvit.errors import ExistsError, InputError, ReadError
from muvit.pictures import class_colors
from muvit.progress import Progress

MANIFEST = "prepare.json"
"""Written into the output first: the data set and options of the conversion."""

SLIDES = "slides.csv"
"""Written into the output last: name, split, group, animal and source of every slide."""


def prepare(
    source: Source,
    output: str | Path,
    *,
    levels: tuple[int, ...] | None = None,
    pixel_size_um: float | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Convert every slide of a data set: ``output/{train,val,test}/{images,labels}/<name>.ome.zarr``.

    Call again to resume an interrupted run: finished stores stay as they are, those of slides whose files have changed
    since are made again. ``output/slides.csv`` is written last, so a data set that has it is complete. Only one run at
    a time may write to a folder.

    Args:
        source: the data set as it was downloaded.
        output: folder to write to.
        levels: downsampling factors to store, by default those of the data set.
        pixel_size_um: micrometers per pixel of the stored finest level, by default that of the files.
        overwrite: start over, regardless of the options and slides of an earlier run.
        progress: called with the number of megapixels done and their total, images and labels counted.

    Returns:
        The folder.

    Raises:
        InputError: the data set is incomplete or contradictory or an argument does not fit (nothing was written), a
            label value has no class, or the folder was begun with other options or with slides that are gone.
        ReadError: a file cannot be read.
        ExistsError: the folder holds something else.
    """
    output = Path(output)
    pixels = check_source(source)
    levels = source.levels if levels is None else levels
    # settings are checked before a folder is begun with them
    check_spec(shape=(1, 1), num_channels=1, dtype="uint8", levels=levels, pixel_size_um=pixel_size_um)
    options = {"levels": list(levels), "pixel_size_um": pixel_size_um, **source.options}
    slides = {f"{item.split}/{item.name}": _fingerprint(item, source.folder) for item in source.items}
    begin(output, {"dataset": source.dataset, "options": options, "slides": slides}, overwrite=overwrite)
    stores: list[tuple[Kind, Item]] = [(kind, item) for item in source.items for kind in ("image", "label")]
    sizes = [max(pixels[item] >> 20, 1) for _, item in stores]
    for index, (kind, item) in enumerate(stores):

        def report(done: int, total: int, *, before: int = sum(sizes[:index]), size: int = sizes[index]) -> None:
            if progress is not None:
                progress(before + size * done // total, sum(sizes))

        target = _store(output, f"{item.split}/{item.name}", kind)
        if not (target / "zarr.json").is_file():
            image = source.open_image(item)
            convert_image(
                image if kind == "image" else source.open_labels(item),
                target,
                kind=kind,
                levels=levels,
                # masks rarely state a pixel size
                pixel_size_um=image.pixel_size_um if pixel_size_um is None else pixel_size_um,
                label_names=dict(enumerate(source.class_names)) if kind == "label" else None,
                label_colors=_colors(source) if kind == "label" else None,
                has_background=source.has_background,
                overwrite=target.exists(),
                progress=report,
            )
        report(1, 1)
    rows = ((i.name, i.split, i.group, i.animal, _relative(i.images[0], source.folder)) for i in source.items)
    write_slides(rows, output / SLIDES)
    return output


def begin(output: Path, manifest: dict[str, Any], *, overwrite: bool) -> None:
    """Check that a folder is new or was begun with the same settings, and write its manifest.

    Args:
        output: the folder.
        manifest: ``dataset``, ``options`` and ``slides`` (the files of each ``split/name``), as JSON. Slides may be
            added to those of an earlier run; the stores of slides that have changed are deleted.
        overwrite: delete everything that another run made.

    Raises:
        InputError: the folder was begun with other options, or with slides that are gone.
        ReadError: the folder's manifest is damaged.
        ExistsError: the folder holds something else.
    """
    file = output / MANIFEST
    if output.exists() and not file.is_file() and (not output.is_dir() or any(output.iterdir())):
        raise ExistsError(output, hint="It was not made by `muvit prepare`: choose another output.")
    manifest = json.loads(json.dumps(manifest))
    if file.is_file() and overwrite:
        # the manifest goes last: it marks the folder as written by this function
        for split in SPLITS:
            shutil.rmtree(output / split, ignore_errors=True)
        (output / SLIDES).unlink(missing_ok=True)
        file.unlink()
    elif file.is_file():
        for name in _changed(file, manifest):
            for kind in get_args(Kind):
                shutil.rmtree(_store(output, name, kind), ignore_errors=True)
    write_whole(file, (json.dumps(manifest, indent=1) + "\n").encode())


def _changed(file: Path, manifest: dict[str, Any]) -> list[str]:
    """Slides that were begun from other files, after a check that all other settings are equal."""
    try:
        before = json.loads(file.read_text())
        old, slides = {"dataset": before["dataset"], **before["options"]}, dict(before["slides"])
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ReadError(file, expected="the settings of an earlier run", got=f"{type(error).__name__}") from error
    hint = "Choose another output, or pass overwrite (--overwrite) to start over."
    new = {"dataset": manifest["dataset"], **manifest["options"]}
    for name in old | new:
        if old.get(name) != new.get(name):
            expected = f"{name} {json.dumps(old.get(name))}, as it was begun with"
            raise InputError(file.parent, expected=expected, got=json.dumps(new.get(name)), hint=hint)
    for name in slides.keys() - manifest["slides"].keys():
        raise InputError(
            file.parent, expected=f"the slide {name} it was begun with", got="a source without it", hint=hint
        )
    return [name for name, made_of in slides.items() if manifest["slides"][name] != made_of]


def _store(output: Path, name: str, kind: Kind) -> Path:
    split, _, slide = name.partition("/")
    return output / split / f"{kind}s" / f"{slide}.ome.zarr"


def _fingerprint(item: Item, folder: Path) -> dict[str, Any]:
    """Fingerprint of the source of a slide: its files with their sizes in bytes, and the part of them that it is."""
    files = {_relative(f, folder): f.stat().st_size for f in (*item.images, *item.labels) if f.is_file()}
    part = {} if item.columns is None else {"columns": list(item.columns)}
    return {"files": files, "factor": item.factor, **part}


def _relative(file: Path, folder: Path) -> str:
    return file.relative_to(folder).as_posix()


def _colors(source: Source) -> dict[int, Color]:
    return dict(enumerate(class_colors(len(source.class_names))))


def write_slides(rows: Iterable[Sequence[str]], file: Path) -> None:
    """Write the table of slides: name, split, group, animal and source of each."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(("name", "split", "group", "animal", "source"))
    table.writerows(rows)
    write_whole(file, text.getvalue().encode())
