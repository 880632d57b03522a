"""A model and its controls under one budget: train each, label the test slides, score them, write a report."""

import csv
import json
import multiprocessing
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer

from muvit.baselines import BaselineConfig
from muvit.data.folders import open_folder, open_labelled_folder
from muvit.data.preprocessing import Preprocessing
from muvit.data.slides import Slide, open_slide
from muvit.errors import ExistsError, InputError
from muvit.evaluation.report import Example, ModelResult, write_report
from muvit.evaluation.segmentation import Evaluation, evaluate_slides
from muvit.geometry import level_name
from muvit.inference.predict import predict_slide
from muvit.models import load_model
from muvit.pictures import to_rgb
from muvit.relay import RelayConfig
from muvit.training.recipe import Recipe
from muvit.training.run import CHECKPOINT
from muvit.training.train import train_segmenter

Progress = Callable[[int, int], None]
"""Called with steps done and steps in all, over all variants."""

_SECONDS = "training_seconds.txt"

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


Preset = tuple[str, str, Callable[[Recipe], Recipe]]


def _with_model(**changes: Any) -> Callable[[Recipe], Recipe]:
    return lambda recipe: replace(recipe, model=replace(recipe.model, **changes), baseline=None, relay=None)


def _finest_only(recipe: Recipe) -> Recipe:
    encoder = recipe.model.encoder
    return _with_model(encoder=replace(encoder, levels=encoder.levels[:1]))(recipe)


def _with_baseline(network: str, **settings: Any) -> Callable[[Recipe], Recipe]:
    def change(recipe: Recipe) -> Recipe:
        config = BaselineConfig(network=network, **settings)  # type: ignore[arg-type]
        return replace(recipe, baseline=config, relay=None, init=None)

    return change


def _with_relay(backbone: str, **settings: Any) -> Callable[[Recipe], Recipe]:
    def change(recipe: Recipe) -> Recipe:
        # numbers, not one per axis: a backbone is two-dimensional, and RelayConfig refuses the others
        finest = cast("tuple[float, ...]", recipe.model.encoder.levels[:1])
        levels = finest if settings.get("relay_tokens") == 0 else None
        config = RelayConfig(backbone=backbone, levels=levels, **settings)
        return replace(recipe, relay=config, baseline=None, init=None)

    return change


_ONE = "sees the finest level only"
_ALL = "sees every level"
PRESETS: dict[str, Preset] = {
    "muvit": ("MuViT[{all}]", f"{_ALL}, each patch at its true place", _with_model()),
    "finest": ("MuViT[{finest}]", _ONE, _finest_only),
    "naive": (
        "MuViT[{all}] naive boxes",
        f"{_ALL}, but not where the crops lie relative to each other",
        _with_model(boxes="naive"),
    ),
    "mask2former": ("MuViT[{all}] Mask2Former", f"{_ALL}, queries in the decoder", _with_model(decoder="mask2former")),
    "unet": ("U-Net", _ONE, _with_baseline("unet")),
    "deeplabv3": ("DeepLabV3", _ONE, _with_baseline("deeplabv3")),
    "segformer": ("SegFormer", _ONE, _with_baseline("segformer")),
    "swinunetr": ("SwinUNETR-V2", _ONE, _with_baseline("swinunetr")),
    "unetr": ("UNETR", _ONE, _with_baseline("unetr")),
    "early_fusion": ("U-Net early fusion", f"{_ALL}, stacked as channels", _with_baseline("unet", views="stacked")),
    "relay_vit": ("ViT-S relay[{all}]", f"{_ALL}, joined by relay tokens", _with_relay("vit_small_patch16_224")),
    "relay_swin": (
        "Swin-V2-S relay[{all}]",
        f"{_ALL}, joined by relay tokens",
        _with_relay("swinv2_small_window8_256"),
    ),
    "vit": ("ViT-S", _ONE, _with_relay("vit_small_patch16_224", relay_tokens=0)),
    "swin": ("Swin-V2-S", _ONE, _with_relay("swinv2_small_window8_256", relay_tokens=0)),
}
"""Models to compare by short name: title, description, and how its recipe follows from another."""

CONTROLS = ("muvit", "finest", "naive")
"""The recipe's model and the paper's two controls."""


def preset(recipe: Recipe, name: str) -> Variant:
    """The model of this short name, on the data and with the budget of a recipe.

    Raises:
        InputError: there is no such name, or the recipe has a single level or naive boxes itself, so that there is
            nothing to compare.
    """
    if name not in PRESETS:
        raise InputError("models", expected=f"names out of {', '.join(PRESETS)}", got=repr(name))
    levels = recipe.model.encoder.levels
    if len(levels) < 2 or recipe.model.boxes != "true":
        raise InputError("model", expected="several levels and true boxes, to be compared with less", got=recipe.model)
    title, description, change = PRESETS[name]
    shown = [level_name(level) for level in levels]
    return Variant(
        name=title.format(all=",".join(shown), finest=shown[0]), description=description, recipe=change(recipe)
    )


def with_controls(recipe: Recipe) -> list[Variant]:
    """The recipe's model and the paper's two controls: its finest level alone, and naive boxes."""
    return [preset(recipe, name) for name in CONTROLS]


def compare(
    variants: Sequence[Variant],
    test: Path,
    output: Path,
    *,
    title: str,
    intro: str,
    settings: dict[str, object] | None = None,
    num_examples: int = 3,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> list[ModelResult]:
    """Train and score models side by side, as many at a time as there are CPU cores.

    Args:
        variants: the models, the one in question first.
        test: folder with ``images`` and ``labels`` that none of them was trained on.
        output: receives ``runs/<slug>``, ``predictions/<slug>/<slide>.ome.zarr``, ``metrics.json``, ``metrics.csv``
            and ``index.html``.
        title: headline of the report.
        intro: its first paragraph.
        settings: facts for the report, added to those that the recipe tells.
        num_examples: test slides to show.
        resume: go on with a comparison that was stopped: what is trained is not trained again.
        overwrite: replace an earlier comparison.
        progress: called while the models train.

    Returns:
        What each model reached, in the order of ``variants``.
    """
    output = Path(output)
    if (output / "metrics.json").exists() and not overwrite:
        raise ExistsError(output / "metrics.json")
    slugs = [variant.slug for variant in variants]
    if len(set(slugs)) != len(slugs):
        raise InputError("variants", expected="different names", got=[variant.name for variant in variants])
    pairs = open_labelled_folder(test)
    job = _Job(output, tuple(image.path for image, _ in pairs), resume, overwrite)
    trained = _train_all(variants, job, progress)
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
    _write_table(output / "metrics.csv", results)
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
class _Job:
    output: Path
    slides: tuple[Path, ...]
    resume: bool
    overwrite: bool


@dataclass(frozen=True)
class _Trained:
    folder: Path
    seconds: float
    curves: dict[str, tuple[list[float], list[float]]]
    parameters: int


class _CountSteps(Callback):
    def __init__(self, index: int) -> None:
        self.index = index

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        _steps[self.index] = trainer.global_step  # also of earlier runs that this one goes on with


def _train_all(variants: Sequence[Variant], job: _Job, progress: Progress | None) -> list[_Trained]:
    cores = os.cpu_count() or 1
    at_once = min(len(variants), cores)
    total = sum(_num_steps(variant.recipe) for variant in variants)
    context = multiprocessing.get_context("spawn")
    steps = context.RawArray("Q", len(variants))  # without a lock, which a worker could take to its grave
    with ProcessPoolExecutor(at_once, context, _start_worker, (cores // at_once, steps)) as pool:
        others = set(multiprocessing.active_children())
        jobs = [pool.submit(_train_and_predict, variant, job, index) for index, variant in enumerate(variants)]
        try:
            _follow(jobs, steps, total, progress)
        except BaseException:
            pool.shutdown(cancel_futures=True, wait=False)
            for worker in set(multiprocessing.active_children()) - others:
                worker.terminate()
                worker.join()
            raise
        return [future.result() for future in jobs]


def _follow(jobs: list[Future[_Trained]], steps: Iterable[int], total: int, progress: Progress | None) -> None:
    running = set(jobs)
    while running:
        finished, running = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
        for future in finished:
            future.result()  # a failure ends the comparison at once
        if progress is not None:
            progress(sum(steps), total)


def _num_steps(recipe: Recipe) -> int:
    return recipe.run.epochs * (recipe.data.samples_per_epoch // recipe.data.batch_size)


_steps: Any = []
"""Steps done by each variant, in memory that all workers share."""


def _start_worker(threads: int, steps: Any) -> None:
    global _steps
    _steps = steps
    torch.set_num_threads(max(1, min(threads, torch.get_num_threads())))  # no more than the environment allows
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """Who is killed cannot end its processes, which would wait for work, with all their memory, for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _train_and_predict(variant: Variant, job: _Job, index: int) -> _Trained:
    run = job.output / "runs" / variant.slug
    recipe = replace(variant.recipe, run=replace(variant.recipe.run, progress=False))  # the bar counts for all
    started = job.resume and (run / CHECKPOINT).exists()
    began, before = time.perf_counter(), _seconds_before(run) if started else 0.0
    folder = train_segmenter(recipe, run, resume=started, overwrite=job.overwrite, callbacks=[_CountSteps(index)])
    seconds = before + time.perf_counter() - began
    _steps[index] = _num_steps(recipe)  # also if it was complete already, or has stopped early
    (run / _SECONDS).write_text(f"{seconds:.1f}\n")
    model, preprocessing = load_model(folder), Preprocessing.load(folder)
    for path in job.slides:
        slide = open_slide(path)
        target = job.output / "predictions" / variant.slug / f"{slide.name}.ome.zarr"
        target.parent.mkdir(parents=True, exist_ok=True)
        # predicting is short, so a resumed comparison does it anew
        predict_slide(model, slide, target, preprocessing, batch_size=16, overwrite=job.resume or job.overwrite)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return _Trained(folder, seconds, read_curves(run, ("train_loss", "val_mdsc")), parameters)


def _seconds_before(run: Path) -> float:
    """Training time of a run so far, as far as it was noted."""
    noted = run / _SECONDS
    return float(noted.read_text()) if noted.exists() else 0.0


def read_curves(run: Path, names: Sequence[str]) -> dict[str, tuple[list[float], list[float]]]:
    """Training steps and values of logged quantities of a run, also of one that was resumed."""
    curves: dict[str, dict[float, float]] = {name: {} for name in names}
    # a complete run that is resumed has a log without a step, and no file
    logs = sorted((run / "logs").glob("version_*/metrics.csv"), key=lambda file: int(file.parent.name.split("_")[1]))
    for log in logs:
        with log.open(newline="") as lines:
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


def _write_table(path: Path, results: Sequence[tuple[ModelResult, Evaluation]]) -> None:
    classes = list(results[0][0].dice)
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["model", "mDSC", *classes, "mean slide mDSC", "parameters", "training minutes"])
        for result, scored in results:
            numbers = [result.mean_dice, *result.dice.values(), scored.mean_slide_dice]
            row = [result.name, *(f"{x:.4f}" for x in numbers), result.parameters, f"{result.seconds / 60:.1f}"]
            table.writerow(row)


def _write_metrics(path: Path, results: Sequence[tuple[ModelResult, Evaluation]]) -> None:
    metrics = {
        result.name: {"parameters": result.parameters, "training_seconds": round(result.seconds, 1)} | scored.to_dict()
        for result, scored in results
    }
    path.write_text(json.dumps(metrics, indent=2) + "\n")


def _example(image: Slide, truth: Slide, predictions: dict[str, Slide]) -> Example:
    def whole(slide: Slide) -> np.ndarray:
        """All of a slide, or the middle slice of a volume, ``(C, H, W)``."""
        level = next((lv for lv in slide.levels if max(slide.level_shape(lv)) <= PICTURE_PX), slide.levels[-1])
        *slices, height, width = slide.level_shape(level)
        pixels = slide.read(level, (*(n // 2 for n in slices), 0, 0), (*(1 for _ in slices), height, width))
        return pixels.reshape(-1, height, width)

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
        "levels": ", ".join(map(level_name, encoder.levels)),
        "crop": f"{data.crop_size} px per level",
        "patch": f"{encoder.patch_size} px",
        "encoder": f"{encoder.num_layers} layers, width {encoder.dim}, {encoder.heads} heads",
        "training": f"{recipe.run.epochs} epochs of {data.samples_per_epoch} crops, {data.batch_size} per step",
        "learning rate": f"{recipe.optim.lr:g}, encoder {recipe.optim.lr * recipe.optim.encoder_lr_factor:g}",
        "seed": recipe.run.seed,
    }
