"""The Synthetic data set, generated in place so that an interrupted run can be resumed."""

import json
import shutil
from functools import partial
from pathlib import Path

from muvit.data.sources.prepare import SLIDES, begin, write_slides
from muvit.data.synthetic.folders import RECORD_NAME, describe, split_indices, write_pairs
from muvit.data.synthetic.images import STORE, SyntheticConfig, draw
from muvit.durable import write_whole
from muvit.progress import Progress


def prepare_synthetic(
    output: str | Path,
    *,
    num_train: int,
    num_val: int,
    num_test: int,
    config: SyntheticConfig,
    workers: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Generate what `muvit.data.synthetic.images.write_synthetic` does, but in place: finished images are kept.

    Args:
        output: folder to write to.
        num_train: number of images for training.
        num_val: number of images for validation.
        num_test: number of images for testing.
        config: appearance of the images.
        workers: number of processes, by default one per CPU core; spawned.
        overwrite: start over if other images were begun before.
        progress: called with (images done, images in all) after each image.

    Returns:
        The folder.

    Raises:
        InputError: a count or ``workers`` does not fit, or the folder was begun with other settings.
        ExistsError: the folder holds something else.
    """
    output = Path(output)
    indices = split_indices(num_train, num_val, num_test)
    record = describe(indices, config, kind=config.kind)
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
    write_pairs(pending, partial(draw, config=config), STORE, workers=workers, progress=report)
    write_whole(output / RECORD_NAME, (json.dumps(record, indent=2) + "\n").encode())
    write_slides(((f"{index:05d}", place.name, "", "", "") for index, place in jobs), output / SLIDES)
    return output


def _stores(index: int, place: Path) -> list[Path]:
    return [place / kind / f"{index:05d}.ome.zarr" for kind in ("images", "labels")]
