"""The Synthetic data set, generated so that an interrupted run can go on."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from muvit.data.sources.prepare import SLIDES, begin, write_slides
from muvit.data.synthetic.images import RECORD_NAME, SyntheticConfig, describe, split_indices, write_images


def prepare_synthetic(
    output: str | Path,
    *,
    num_train: int,
    num_val: int,
    num_test: int,
    config: SyntheticConfig,
    workers: int | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Generate what `muvit.data.synthetic.images.write_synthetic` does, but in place: finished images are kept.

    Args:
        output: folder to write to.
        num_train: number of images for training.
        num_val: number of images for validation.
        num_test: number of images for testing.
        config: what the images look like.
        workers: number of processes, by default one per CPU core; spawned.
        overwrite: begin anew if other images were begun before.
        progress: called with (images done, images in all) after each image.

    Returns:
        The folder.

    Raises:
        InputError: a count or ``workers`` does not fit, or the folder was begun with other settings.
        ExistsError: the folder holds something else.
    """
    output = Path(output)
    indices = split_indices(num_train, num_val, num_test)
    record = describe(indices, config)
    begin(output, {"dataset": "synthetic", "options": record, "slides": {}}, overwrite=overwrite)
    jobs = [(index, output / split) for split, chosen in indices.items() for index in chosen]
    pending = [job for job in jobs if not all((store / "zarr.json").is_file() for store in _stores(*job))]
    for job in pending:
        for store in _stores(*job):
            shutil.rmtree(store, ignore_errors=True)
    finished = len(jobs) - len(pending)

    def report(done: int, _: int) -> None:
        if progress is not None:
            progress(finished + done, len(jobs))

    report(0, 0)
    write_images(pending, config, workers=workers, progress=report)
    (output / RECORD_NAME).write_text(json.dumps(record, indent=2) + "\n")
    write_slides(((f"{index:05d}", place.name, "", "", "") for index, place in jobs), output / SLIDES)
    return output


def _stores(index: int, place: Path) -> list[Path]:
    return [place / kind / f"{index:05d}.ome.zarr" for kind in ("images", "labels")]
