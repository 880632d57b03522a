"""How many samples does one core cut out of slides in a second? Nested RGB crops of 256 x 256 px, levels 1, 8, 32.

    python benchmarks/crops.py --slides ../shared/data/slides/cmu_small_region.svs ../shared/data/slides/slide.tiff
    python benchmarks/crops.py --rates rates.json --before earlier.json
    python benchmarks/crops.py --latency 0.02

The generated slide of 8192 x 8192 px is a stained section of scikit-image, mirrored, with noise, as OME-Zarr and as
OME-TIFF of JPEG tiles; ``--slides`` adds files. A rate counts the processor's time of this process on one thread. Each
is the best of several runs after a warm-up, in which levels that are kept in memory are read. ``--rates`` writes the
rates as JSON, ``--before`` shows those of such a file of another commit beside them.

``--latency`` measures nothing of that, but batches from a server of this machine that waits so long before each answer.
"""

import argparse
import json
import re
import resource
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import tifffile
import torch
from markdown_table import markdown_table
from skimage.data import immunohistochemistry
from torch.utils.data import DataLoader

from muvit.data.crops.augment import Augmentation
from muvit.data.crops.crops import NestedCrops
from muvit.data.crops.normalize import Percentile, Range
from muvit.data.crops.preprocessing import CropConfig
from muvit.data.crops.stored import collate, finish
from muvit.data.pyramids.convert import convert_image
from muvit.data.slides.derived import with_levels
from muvit.data.slides.open import open_slide
from muvit.data.slides.slide import Slide

LEVELS, SIZE, SIDE, BATCH = (1, 8, 32), 256, 8192, 16
CACHE_MIB = 16
"""Holds levels 8 and 32 of a slide, and not level 1, as 512 MiB do for 30 slides of 100,000 x 50,000 px."""


def write_slides(folder: Path) -> dict[str, Path]:
    """The generated slide as OME-Zarr and as OME-TIFF, both with levels 1, 2, 4 ... 32."""
    section = immunohistochemistry()
    section = np.concatenate([section, section[::-1]])
    section = np.concatenate([section, section[:, ::-1]], axis=1)
    pixels = np.tile(section, (SIDE // len(section), SIDE // len(section), 1))
    noise = np.random.default_rng(0).standard_normal(pixels.shape, dtype=np.float32)
    pixels = np.clip(pixels + 2 * noise, 0, 255).astype(np.uint8)
    tiff, zarr = folder / "slide.ome.tif", folder / "slide.ome.zarr"
    options: dict[str, Any] = {"photometric": "rgb", "tile": (256, 256), "compression": "jpeg"}
    with tifffile.TiffWriter(tiff, ome=True) as writer:
        writer.write(pixels, subifds=5, metadata={"axes": "YXS"}, **options)
        for _ in range(5):
            pixels = pixels.reshape(len(pixels) // 2, 2, -1, 2, 3).mean(axis=(1, 3)).astype(np.uint8)
            writer.write(pixels, subfiletype=1, **options)
    convert_image(tiff, zarr, levels=(1, 2, 4, 8, 16, 32))
    return {"OME-Zarr, generated": zarr, "OME-TIFF of JPEG tiles, generated": tiff}


def best_rate(run: Callable[[int], object], seconds: float, repeats: int = 7) -> float:
    """Calls per second of processor time: the best of several runs after a warm-up as long as one."""
    rates, number = [], 0
    for _ in range(1 + repeats):
        begin, first = time.process_time(), number
        while (spent := time.process_time() - begin) < seconds or number == first:
            run(number)
            number += 1
        rates.append((number - first) / spent)
    return max(rates[1:])


def measure(slide: Slide, seconds: float) -> dict[str, float]:
    """Samples per second of one core, by what is done to them."""
    sets = {
        name: NestedCrops(
            [(slide, None)],
            CropConfig(levels=LEVELS, size=(SIZE, SIZE), normalization=normalization, cache_mib=CACHE_MIB),
            samples_per_epoch=1 << 20,
            augmentation=augmentation,
        )
        for name, normalization, augmentation in (
            ("range", Range(high=255), None),
            ("percentile", Percentile(), None),
            ("percentile of the sample", Percentile(scope="sample"), None),
            ("percentile, augmentation", Percentile(), Augmentation()),
        )
    }
    crops = sets["range"]
    image = crops.images[0]

    def read(number: int) -> None:
        placed = crops.place(0, rng=np.random.default_rng(number))
        for window in placed.windows:
            image.read(window.level, window.start, window.size)

    rates = {"pixels alone": best_rate(read, seconds)}
    rates |= {name: best_rate(data.__getitem__, seconds) for name, data in sets.items()}
    stored = sets["percentile, augmentation"].as_stored()
    batches = iter(DataLoader(stored, batch_size=BATCH, collate_fn=collate))
    rates["batches of 16 of these"] = BATCH * best_rate(lambda _: finish(next(batches)), seconds)
    rates["their reading, measuring and stacking"] = BATCH * best_rate(lambda _: next(batches), seconds)
    batch = next(batches)
    rates["their normalisation and augmentation"] = BATCH * best_rate(lambda _: finish(batch), seconds)
    return rates


def measure_processes(path: Path, batches: int = 20) -> str:
    """A sentence on the processor time of all processes for batches of one worker process, and their finishing."""
    config = CropConfig(levels=LEVELS, size=(SIZE, SIZE), cache_mib=CACHE_MIB)
    spent = []
    for count in (4, 4 + batches):  # the difference is without what it takes to start
        crops = NestedCrops(
            [(with_levels(open_slide(path), LEVELS), None)],
            config,
            samples_per_epoch=count * BATCH,
            augmentation=Augmentation(),
        )
        options: dict[str, Any] = {"num_workers": 1, "multiprocessing_context": "spawn", "collate_fn": collate}
        begin = processor_seconds()
        for batch in DataLoader(crops.as_stored(), BATCH, **options):
            finish(batch)["img"].sum()
        spent.append(processor_seconds() - begin)
    own, all_processes = 1000 * (spent[1] - spent[0]) / batches / BATCH
    mib = batch["img"].numpy().nbytes / 2**20
    return (
        f"{all_processes:.1f} ms a sample, {own:.1f} of them in the training process; {mib:.0f} MiB of pixels a batch"
    )


def processor_seconds() -> np.ndarray:
    """Seconds of this process, and of it and its children that have ended."""
    own, children = (sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return np.array([own, own + children])


@contextmanager
def served(folder: Path, latency: float) -> Iterator[str]:
    """The address of a folder behind HTTP whose server waits before each answer, in seconds."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            time.sleep(latency)
            file = folder / self.path.lstrip("/")
            if not file.is_file():
                self.send_error(404)
                return
            size, wanted = file.stat().st_size, re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers["Range"] or "")
            low, high = wanted.groups() if wanted else ("0", "")
            start = int(low) if low else size - int(high)
            stop = int(high) + 1 if low and high else size
            with file.open("rb") as stream:
                stream.seek(start)
                part = stream.read(stop - start)
            self.send_response(206 if wanted else 200)
            self.send_header("Content-Length", str(len(part)))
            self.send_header("Content-Range", f"bytes {start}-{start + len(part) - 1}/{size}")
            self.end_headers()
            self.wfile.write(part)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def measure_remote(folder: Path, latency: float, count: int = 6) -> None:
    """Print the seconds that batches from a server take: sample by sample, and asked for as a whole."""
    path = write_slides(folder)["OME-Zarr, generated"]
    with served(folder, latency) as address:
        for cache_mib in (0, CACHE_MIB):
            config = CropConfig(levels=LEVELS, size=(SIZE, SIZE), cache_mib=cache_mib)
            for name in ("one by one", "as a whole"):
                slide = with_levels(open_slide(f"{address}/{path.name}"), LEVELS)
                crops, seconds = NestedCrops([(slide, None)], config, samples_per_epoch=1 << 20), []
                for first in range(0, count * BATCH, BATCH):
                    indices, begin = range(first, first + BATCH), time.perf_counter()
                    _ = crops.__getitems__(indices) if name == "as a whole" else [crops[i] for i in indices]
                    seconds.append(time.perf_counter() - begin)
                first_batch, *others = seconds
                print(
                    f"{cache_mib} MiB kept, {name}: {first_batch:.2f} s, then {sorted(others)[len(others) // 2]:.2f} s"
                )


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slides", nargs="*", type=Path, default=[], help="files to measure too")
    parser.add_argument("--seconds", type=float, default=0.4, help="processor time of each run")
    parser.add_argument("--rates", type=Path, help="JSON file to write the rates to")
    parser.add_argument("--before", type=Path, help="rates of another commit")
    parser.add_argument("--latency", type=float, help="seconds before each answer of a server; measures it alone")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.latency is not None:
        with TemporaryDirectory() as folder:
            measure_remote(Path(folder), arguments.latency)
        return
    before = json.loads(arguments.before.read_text()) if arguments.before else {}
    rates: dict[str, dict[str, float]] = {}
    with TemporaryDirectory() as folder:
        slides = write_slides(Path(folder))
        print("With one worker:", measure_processes(slides["OME-Zarr, generated"]))
        for name, path in (slides | {file.name: file for file in arguments.slides}).items():
            rates[name] = measure(with_levels(open_slide(path), LEVELS), arguments.seconds)
            print(name, {task: round(rate) for task, rate in rates[name].items()}, flush=True)
    if arguments.rates:
        arguments.rates.write_text(json.dumps(rates))
    rows = [
        (slide, task, before.get(slide, {}).get(task), rate) for slide in rates for task, rate in rates[slide].items()
    ]
    print(as_table(rows))


def as_table(rows: Sequence[tuple[str, str, float | None, float]]) -> str:
    """Slide, task, earlier rate and rate."""
    cells = [[slide, task, "" if old is None else f"{old:.0f}", f"{new:.0f}"] for slide, task, old, new in rows]
    return markdown_table(["slide", "samples", "before [1/s]", "now [1/s]"], cells)


if __name__ == "__main__":
    main()
