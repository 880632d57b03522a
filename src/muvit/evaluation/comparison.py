"""A model and its controls under one budget: train each, label the test slides, score them, write a report."""

import csv
import json
import multiprocessing
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Empty, Queue
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer

from muvit.data.folders import open_folder, open_labelled_folder
from muvit.data.preprocessing import Preprocessing
from muvit.data.slides import Slide, open_slide
from muvit.errors import ExistsError, InputError
from muvit.evaluation.report import Example, ModelResult, write_report
from muvit.evaluation.segmentation import Evaluation, evaluate_slides
from muvit.inference.predict import predict_slide
from muvit.pictures import to_rgb
from muvit.segmentation import Segmenter
from muvit.training.recipe import Recipe
from muvit.training.train import train_segmenter

Progress = Callable[[int, int], None]
"""Called with steps done and steps in all, over all variants."""

PICTURE_PX = 1024
"""Longest side of a slide as shown in the report."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One of the models to compare."""

    name: str
    """What the report calls it."""
    description: str
    """What sets it apart, one sentence."""
    recipe: Recipe
    """How to train it."""

    @property
    def slug(self) -> str:
        """The name as a folder name."""
        return re.sub(r"[^a-z0-9]+", "_", self.name.lower()).strip("_")


def with_controls(recipe: Recipe) -> list[Variant]:
    """The recipe's model and the paper's two controls: its finest level alone, and naive boxes.

    Raises:
        InputError: the recipe has a single level, so that there is nothing to compare.
    """
    encoder = recipe.model.encoder
    if len(encoder.levels) < 2 or recipe.model.boxes != "true":
        raise InputError("model", expected="several levels and true boxes, to be compared with less", got=recipe.model)
    single = replace(recipe.model, encoder=replace(encoder, levels=encoder.levels[:1]))
    finest, levels = f"MuViT[{encoder.levels[0]:g}]", f"MuViT[{','.join(f'{level:g}' for level in encoder.levels)}]"
    return [
        Variant(name=levels, description="sees every level, each patch at its true place", recipe=recipe),
        Variant(name=finest, description="sees the finest level only", recipe=replace(recipe, model=single)),
        Variant(
            name=f"{levels} naive boxes",
            description="sees every level, but not where the crops lie relative to each other",
            recipe=replace(recipe, model=replace(recipe.model, boxes="naive")),
        ),
    ]


def compare(
    variants: Sequence[Variant],
    test: Path,
    output: Path,
    *,
    title: str,
    intro: str,
    settings: dict[str, object] | None = None,
    num_examples: int = 3,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> list[ModelResult]:
    """Train and score models side by side, as many at a time as there are CPU cores.

    Args:
        variants: the models, the one in question first.
        test: folder with ``images`` and ``labels`` that none of them was trained on.
        output: receives ``runs/<slug>``, ``predictions/<slug>/<slide>.ome.zarr``, ``metrics.json``, ``index.html``.
        title: headline of the report.
        intro: its first paragraph.
        settings: facts for the report, added to those that the recipe tells.
        num_examples: test slides to show.
        overwrite: replace an earlier comparison.
        progress: called while the models train.

    Returns:
        What each model reached, in the order of ``variants``.
    """
    output = Path(output)
    if (output / "metrics.json").exists() and not overwrite:
        raise ExistsError(output / "metrics.json")
    pairs = open_labelled_folder(test)
    trained = _train_all(variants, output, [image.path for image, _ in pairs], overwrite, progress)
    num_classes = variants[0].recipe.model.num_classes
    ignore = variants[0].recipe.data.ignore_labels
    legend = Preprocessing.load(trained[0].folder)
    results, labels = [], {}
    for variant, run in zip(variants, trained, strict=True):
        labels[variant.name] = open_folder(output / "predictions" / variant.slug)
        scored = evaluate_slides(
            [(labels[variant.name][truth.name], truth) for _, truth in pairs],
            num_classes,
            ignore=ignore,
            class_names=legend.class_names,
        )
        results.append((_result(variant, run, scored, legend), scored))
    _write_metrics(output / "metrics.json", results)
    examples = [
        _example(image, truth, {name: slides[truth.name] for name, slides in labels.items()})
        for image, truth in _spread(pairs, num_examples)
    ]
    recipe, first = variants[0].recipe, pairs[0][0].name
    write_report(
        output,
        title=title,
        intro=intro,
        models=[result for result, _ in results],
        class_names=legend.class_names,
        class_colors=legend.class_colors,
        examples=examples,
        settings=_settings(recipe) | (settings or {}),
        outputs={"image": os.path.relpath(pairs[0][0].path, output)}
        | {f"labels by {v.name}": f"predictions/{v.slug}/{first}.ome.zarr" for v in variants},
        ignore=ignore,
        overwrite=overwrite,
    )
    return [result for result, _ in results]


# -- training and prediction, each variant in a process of its own ---------------------------------------------------


@dataclass(frozen=True)
class _Trained:
    folder: Path
    seconds: float
    curves: dict[str, tuple[list[float], list[float]]]
    parameters: int


class _CountSteps(Callback):
    def __init__(self, queue: "Queue[int]") -> None:
        self.queue = queue

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.queue.put(1)


def _train_all(
    variants: Sequence[Variant], output: Path, slides: list[Path], overwrite: bool, progress: Progress | None
) -> list[_Trained]:
    cores = os.cpu_count() or 1
    at_once = min(len(variants), cores)
    total = sum(v.recipe.run.epochs * (v.recipe.data.samples_per_epoch // v.recipe.data.batch_size) for v in variants)
    context = multiprocessing.get_context("spawn")
    with (
        context.Manager() as manager,
        ProcessPoolExecutor(at_once, context, _start_worker, (cores // at_once,)) as pool,
    ):
        queue: Queue[int] = manager.Queue()
        others = set(multiprocessing.active_children())
        jobs = [pool.submit(_train_and_predict, v, output, slides, overwrite, queue) for v in variants]
        try:
            _follow(jobs, queue, total, progress)
        except BaseException:
            pool.shutdown(cancel_futures=True, wait=False)
            for worker in set(multiprocessing.active_children()) - others:
                worker.terminate()
                worker.join()
            raise
        return [job.result() for job in jobs]


def _follow(jobs: list[Future[_Trained]], queue: "Queue[int]", total: int, progress: Progress | None) -> None:
    done, running = 0, set(jobs)
    while running:
        finished, running = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
        for job in finished:
            job.result()  # a failure ends the comparison at once
        try:
            while True:
                done += queue.get_nowait()
        except Empty:
            if progress is not None:
                progress(done, total)


def _start_worker(threads: int) -> None:
    torch.set_num_threads(max(1, threads))
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """Who is killed cannot end its processes, which would wait for work, with all their memory, for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _train_and_predict(
    variant: Variant, output: Path, slides: list[Path], overwrite: bool, queue: "Queue[int]"
) -> _Trained:
    run, began = output / "runs" / variant.slug, time.perf_counter()
    recipe = replace(variant.recipe, run=replace(variant.recipe.run, progress=False))  # the bar counts for all
    folder = train_segmenter(recipe, run, overwrite=overwrite, callbacks=[_CountSteps(queue)])
    seconds = time.perf_counter() - began
    model, preprocessing = Segmenter.from_folder(folder), Preprocessing.load(folder)
    for path in slides:
        slide = open_slide(path)
        target = output / "predictions" / variant.slug / f"{slide.name}.ome.zarr"
        target.parent.mkdir(parents=True, exist_ok=True)
        predict_slide(model, slide, target, preprocessing, batch_size=16, overwrite=overwrite)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return _Trained(folder, seconds, read_curves(run, ("train_loss", "val_mdsc")), parameters)


def read_curves(run: Path, names: Sequence[str]) -> dict[str, tuple[list[float], list[float]]]:
    """Training steps and values of logged quantities of a run, also of one that was resumed."""
    curves: dict[str, dict[float, float]] = {name: {} for name in names}
    logs = sorted((run / "logs").glob("version_*"), key=lambda folder: int(folder.name.removeprefix("version_")))
    for log in logs:
        with (log / "metrics.csv").open(newline="") as lines:
            for row in csv.DictReader(lines):
                for name in names:
                    if row.get(name):  # a resumed run repeats the steps after its last checkpoint
                        curves[name][float(row["step"])] = float(row[name])
    return {name: (sorted(curve), [curve[step] for step in sorted(curve)]) for name, curve in curves.items()}


# -- results -----------------------------------------------------------------------------------------------------------


def _result(variant: Variant, run: _Trained, scored: Evaluation, legend: Preprocessing) -> ModelResult:
    return ModelResult(
        name=variant.name,
        description=variant.description,
        dice={name: float(d) for name, d in zip(legend.class_names[1:], scored.pooled.dice[1:], strict=True)},
        mean_dice=scored.pooled.mean_dice,
        curves=run.curves,
        seconds=run.seconds,
        parameters=run.parameters,
    )


def _write_metrics(path: Path, results: Sequence[tuple[ModelResult, Evaluation]]) -> None:
    metrics = {
        result.name: {"parameters": result.parameters, "training_seconds": round(result.seconds, 1)} | scored.to_dict()
        for result, scored in results
    }
    path.write_text(json.dumps(metrics, indent=2) + "\n")


def _example(image: Slide, truth: Slide, predictions: dict[str, Slide]) -> Example:
    def whole(slide: Slide) -> np.ndarray:
        level = next((lv for lv in slide.levels if max(slide.level_shape(lv)) <= PICTURE_PX), slide.levels[-1])
        return slide.read(level, (0,) * slide.ndim, slide.level_shape(level))

    return Example(
        title=image.name,
        image=to_rgb(whole(image)),
        truth=whole(truth)[0],
        predictions={name: whole(slide)[0] for name, slide in predictions.items()},
    )


def _spread(pairs: list[tuple[Slide, Slide]], count: int) -> list[tuple[Slide, Slide]]:
    chosen = (
        np.linspace(0, len(pairs) - 1, min(count, len(pairs)) + 2)[1:-1] if len(pairs) > count else range(len(pairs))
    )
    return [pairs[int(i)] for i in chosen]


def _settings(recipe: Recipe) -> dict[str, object]:
    data, encoder = recipe.data, recipe.model.encoder
    return {
        "levels": ", ".join(f"{level:g}" for level in encoder.levels),
        "crop": f"{data.crop_size} px per level",
        "patch": f"{encoder.patch_size} px",
        "encoder": f"{encoder.num_layers} layers, width {encoder.dim}, {encoder.heads} heads",
        "training": f"{recipe.run.epochs} epochs of {data.samples_per_epoch} crops, {data.batch_size} per step",
        "learning rate": f"{recipe.optim.lr:g}, encoder {recipe.optim.lr * recipe.optim.encoder_lr_factor:g}",
        "seed": recipe.run.seed,
    }
