"""Every verb that writes, on slides of a few pixels and models of a few weights, for tests that interrupt them."""

import multiprocessing
import os
import signal
import sys
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from small_slides import write_slides
from tifffile import imwrite

import muvit.cli.compare
import muvit.cli.convert
import muvit.cli.demo
import muvit.cli.evaluate
import muvit.cli.export
import muvit.cli.features
import muvit.cli.predict
import muvit.durable
import muvit.evaluation.comparison
import muvit.training.fit  # every module that a verb needs is imported once, by the server
from muvit.cli import main
from muvit.data.crops.normalize import Range
from muvit.data.crops.preprocessing import Preprocessing
from muvit.models.classifier import Classifier, ClassifierConfig
from muvit.models.encoder import EncoderConfig
from muvit.models.folder import plain
from muvit.models.mae import MAEConfig
from muvit.models.segmenter import Segmenter, SegmenterConfig
from muvit.models.trained import TrainedModel
from muvit.training.recipes import (
    ClassifyDataConfig,
    ClassifyRecipe,
    DataConfig,
    PretrainDataConfig,
    PretrainRecipe,
    Recipe,
)
from muvit.training.resume import has_state
from muvit.training.run_config import RunConfig

TRAINING = ("train", "pretrain", "train-classifier")
VERBS = (*TRAINING, "convert", "predict", "features", "export", "evaluate", "classify", "compare")


class Workshop:
    """A folder with all that the verbs read.

    Args:
        folder: receives slides, recipes, a model and a prediction.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        write_slides(folder, shape=(192, 192))
        pixels = np.random.default_rng(0).integers(0, 256, (1500, 1500), dtype=np.uint8)
        imwrite(folder / "image.tif", pixels)
        train, val = str(folder / "train"), str(folder / "val")
        crops = {"crop_size": 16, "samples_per_epoch": 6, "val_samples": 2, "batch_size": 2, "train": train}
        encoder = EncoderConfig(in_channels=1, levels=(1, 4), patch_size=4, dim=16, num_layers=2, heads=2)
        run = RunConfig(epochs=3, accelerator="cpu", progress=False, pictures=0, save_every="0s")
        segmenter = SegmenterConfig(encoder=encoder, num_classes=2, decoder_widths=(8, 8, 4), stem_width=4)
        classifier = ClassifierConfig(encoder=encoder, num_classes=2)
        classes = ClassifyDataConfig(**crops, val=val, classes=str(folder / "slides.csv"))
        mae = MAEConfig(encoder=encoder, dim_decoder=16)
        recipes = {
            "train": Recipe(data=DataConfig(**crops, val=val), model=segmenter, run=run),
            "pretrain": PretrainRecipe(data=PretrainDataConfig(**crops, val=val), model=mae, run=run),
            "train-classifier": ClassifyRecipe(data=classes, model=ClassifierConfig(encoder=encoder), run=run),
        }
        for name, recipe in recipes.items():
            (folder / f"{name}.yaml").write_text(yaml.safe_dump(plain(asdict(recipe))))
        torch.manual_seed(0)
        preprocessing = Preprocessing(
            crop_size=(16, 16),
            normalization=Range(high=255),
            class_names=("dark", "bright"),
            class_colors=((0, 0, 0), (9, 9, 9)),
        )
        TrainedModel(model=Segmenter(segmenter), preprocessing=preprocessing).save(folder / "model")
        TrainedModel(model=Classifier(classifier), preprocessing=preprocessing).save(folder / "classifier")
        assert self.call("predict", folder / "prediction").code == 0

    def command(self, verb: str, output: Path) -> list[str]:
        """The arguments of a verb that writes to ``output``; it goes on with what an earlier call left there."""
        folder, target = self.folder, ["--output", str(output)]
        slide = str(folder / "val" / "images" / "val0.ome.zarr")
        if verb in TRAINING:
            goes_on = ["--resume"] if has_state(output) else ["--overwrite"]
            return [verb, "--config", f"{folder / verb}.yaml", *target, *goes_on]
        if verb == "compare":
            rest = ["--config", f"{folder / 'train'}.yaml", "--test", str(folder / "val"), "--devices", "cpu"]
            goes_on = ["--resume"] if output.exists() else []
            return [verb, *rest, "--models", "[muvit,finest]", *target, *goes_on]
        if verb in ("predict", "features"):
            blocks = ["--block_px", "32", "--probabilities", "float16"] if verb == "predict" else []
            return [verb, str(folder / "model"), slide, *target, "--device", "cpu", *blocks]
        if verb == "demo":
            return [verb, "--quick", "--devices", "cpu", *target, *(["--resume"] if output.exists() else [])]
        if verb == "study":
            return [verb, "noise", str(folder / "model"), "--data", str(folder / "val"), "--device", "cpu", *target]
        prediction = str(folder / "prediction" / "val0.ome.zarr")
        if verb == "export":
            return [verb, prediction, *target, "--geojson", "--areas", "--overview", "--overwrite"]
        if verb == "evaluate":
            return [verb, prediction, str(folder / "val" / "labels" / "val0.ome.zarr"), *target, "--overwrite"]
        if verb == "classify":
            return [
                verb,
                str(folder / "classifier"),
                slide,
                *target,
                "--device",
                "cpu",
                "--num_crops",
                "9",
                "--overwrite",
            ]
        return [verb, str(folder / "image.tif"), *target, "--overwrite"]

    def start(self, verb: str, output: Path, *more: str, renames: int | None = None, cold: bool = False) -> "Call":
        """Start a verb in a process of its own.

        Args:
            verb: the verb.
            output: its output.
            more: further arguments.
            renames: the process is killed when it has made so many; None: it is not.
            cold: workers import everything by themselves, as for users, which takes seconds.
        """
        return Call([*self.command(verb, output), *more], self.folder / "said.txt", renames, cold)

    def call(self, verb: str, output: Path) -> "Call":
        """Run a verb to its end."""
        call = self.start(verb, output)
        call.process.join(570)
        return call


CONTEXT = multiprocessing.get_context("forkserver")  # whose server has imported everything: a call begins at once
CONTEXT.set_forkserver_preload(["muvit.evaluation.comparison", "muvit.training.fit", "muvit.cli.predict"])


class Call:
    """The command line in a process, whose messages are kept.

    Args:
        arguments: those of the command.
        file: receives the messages.
        renames: files and folders that the process may rename before it is killed; None, any number.
        cold: workers are spawned; else they come from the server of this process, in its session.
    """

    def __init__(self, arguments: list[str], file: Path, renames: int | None = None, cold: bool = False) -> None:
        self.file = file
        self.process = CONTEXT.Process(target=_run, args=(arguments, file, renames, cold))
        self.process.start()

    def others(self) -> list[int]:
        """Workers, and theirs."""
        assert self.process.pid is not None
        return [pid for pid in members(self.process.pid) if pid != self.process.pid]

    @property
    def code(self) -> int | None:
        """Exit code; negative, the signal that killed the process."""
        return self.process.exitcode

    @property
    def said(self) -> str:
        """All that was written to standard error."""
        return self.file.read_text()


def members(session: int) -> list[int]:
    """Processes of a session that have not ended."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            state, _, _, of, *_ = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(of) == session and state != "Z":
                found.append(int(folder.name))
    return sorted(found)


def _run(arguments: list[str], file: Path, renames: int | None, cold: bool) -> None:
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which shells take from what runs in the background
    if renames is not None:
        _die_after(renames)
    if not cold:
        get_context = multiprocessing.get_context
        multiprocessing.get_context = lambda kind=None: get_context("forkserver" if kind == "spawn" else kind)
    if arguments[0] == "demo":
        _shorten_demo()
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    sys.exit(main(arguments))


def _shorten_demo() -> None:
    original = muvit.cli.demo.recipe

    def short(data: Path, seed: int = 0, *, quick: bool = False) -> Recipe:
        recipe = original(data, seed, quick=quick)
        encoder = replace(recipe.model.encoder, dim=16, num_layers=3, heads=1)
        return replace(
            recipe,
            model=replace(recipe.model, encoder=encoder),
            data=replace(recipe.data, crop_size=16, samples_per_epoch=16, val_samples=4),
        )

    muvit.cli.demo.recipe = short


def _die_after(renames: int) -> None:
    """Let this process be killed instead of making a rename, after others; no signal handler can prevent it."""
    left = renames

    def counted(rename: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return rename(*arguments, **options)

        return call

    os.rename, os.replace = counted(os.rename), counted(os.replace)
    muvit.durable._exchange = counted(muvit.durable._exchange)


def result(verb: str, output: Path) -> dict[str, bytes]:
    """The files of a verb that depend on nothing but its input: no times, no logs, no ledger."""
    names = {"train": "*/model.safetensors", "pretrain": "*/model.safetensors"}
    names |= {"train-classifier": "*/model.safetensors", "compare": "**/*.safetensors", "demo": "runs/**/*.safetensors"}
    names |= {"study": "noise.[cj]s*"}
    found = output.glob(names.get(verb, "**/*"))
    files = sorted(path for path in found if path.is_file() and path.suffix != ".html")  # pages name durations
    return {str(path.relative_to(output)): path.read_bytes() for path in files}


def leftovers(output: Path) -> list[str]:
    """Hidden names that a killed save leaves, and that the next one of the same target removes."""
    return sorted(str(path) for path in output.parent.rglob(".*.partial"))
