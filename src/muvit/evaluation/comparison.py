"""A model and its controls under one budget: train each, label the test slides, score them, write a report."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from muvit.data.annotations.open import config_of, is_annotation
from muvit.data.crops.preprocessing import Preprocessing
from muvit.data.folders import list_slides, open_label_images, open_pairs
from muvit.data.slides.derived import with_levels
from muvit.data.slides.slide import Slide
from muvit.durable import write_whole
from muvit.errors import ExistsError, InputError
from muvit.evaluation.report.content import ModelResult
from muvit.evaluation.report.examples import LabelledSlide, read_examples, spread
from muvit.evaluation.report.page import write_report
from muvit.evaluation.report.places import places_section
from muvit.evaluation.report.runs import LiveComparison
from muvit.evaluation.results import Row, write_rows
from muvit.evaluation.scores.bootstrap import Interval, bootstrap_intervals, seed_interval
from muvit.evaluation.scores.segmentation import Evaluation, evaluate_slides
from muvit.evaluation.side_by_side import Trained, choose_devices, train_and_label
from muvit.evaluation.variants import Variant
from muvit.levels import Level, level_factors, level_name
from muvit.progress import Progress
from muvit.training.recipes import DataConfig, Recipe
from muvit.training.slides import complete

FEWEST_SLIDES = 5
"""Test slides below which intervals are not drawn: resampling so few understates how much others differ."""


def compare(
    variants: Sequence[Variant],
    test: Path,
    output: Path,
    *,
    title: str,
    intro: str,
    settings: dict[str, object] | None = None,
    num_examples: int = 3,
    seeds: Sequence[int] = (),
    devices: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> list[ModelResult]:
    """Train and score models side by side, one at a time on each device.

    Args:
        variants: the models, the one in question first.
        test: folder with ``images`` and ``labels`` that none of them was trained on, or a table of slides.
        output: receives ``runs/<slug>``, ``predictions/<slug>/<slide>.ome.zarr``, ``metrics.json``, ``metrics.csv``
            and ``index.html``, which shows the trainings as long as they go on; with several seeds a slug ends in
            ``_seed_<seed>``.
        title: headline of the report.
        intro: its first paragraph.
        settings: facts for the report, added to those that the recipe tells.
        num_examples: test slides to show, with the labels of the first seed.
        seeds: each model is trained once with each, and its scores are means over them; by default once with the seed
            of its recipe.
        devices: where to train, such as cuda:0,cuda:1, or cpu; by default every GPU, else the CPU, which is shared by
            as many models as it has cores.
        resume: go on with a comparison that was stopped: what is trained is not trained again, the results are
            written anew.
        overwrite: replace an earlier comparison.
        progress: called while the models train.

    Returns:
        What each model reached, in the order of ``variants``.

    Raises:
        ExistsError: there are results, and neither ``resume`` nor ``overwrite`` is set.
        InputError: variants, test slides and devices do not fit each other; found before any training.
    """
    output = Path(output)
    _check_output(output, resume=resume, overwrite=overwrite)
    _check_seeds(seeds)
    variants = [replace(variant, recipe=complete(variant.recipe)) for variant in variants]
    if any(variant.recipe.run.folds is not None for variant in variants):
        raise InputError("run.folds", expected="none: a comparison trains each model once", got="a cross-validation")
    trainings = [training for variant in variants for training in _with_seeds(variant, seeds)]
    slugs = [training.slug for training in trainings]
    if len(set(slugs)) != len(slugs):
        raise InputError("variants", expected="different names", got=[variant.name for variant in variants])
    places = [choose_devices(variant.recipe.run, devices) for variant in variants]
    pairs = _open_test(variants[0].recipe.data, Path(test))
    for variant in variants:
        check_test_slides(variant.recipe, pairs)
    slides = [image.path for image, _ in pairs]
    runs_of = {training.name: f"runs/{training.slug}" for training in trainings}
    page = LiveComparison(output, title, runs_of)
    try:
        trained = train_and_label(
            trainings,
            slides,
            output,
            devices=places[0],
            resume=resume,
            overwrite=overwrite,
            progress=progress,
            watch=page.update,
        )
    except BaseException:
        page.close()
        raise
    legend = Preprocessing.load(trained[0].folder)
    labels = {training.name: open_label_images([output / "predictions" / training.slug]) for training in trainings}
    ignore = variants[0].recipe.data.ignore_labels
    scored = [
        evaluate_slides(
            [(found[truth.name], truth) for _, truth in pairs],
            _num_classes(variants[0].recipe),
            ignore=ignore,
            class_names=legend.class_names,
            has_background=legend.has_background,
            levels=_coarse_levels(variants[0].recipe),
        )
        for found in labels.values()
    ]
    num = max(len(seeds), 1)
    runs = [trained[i : i + num] for i in range(0, len(trained), num)]
    scored_runs = [scored[i : i + num] for i in range(0, len(scored), num)]
    results = [
        _result(variant, own, scores, scored_runs[0])
        for variant, own, scores in zip(variants, runs, scored_runs, strict=True)
    ]
    shown = {variant.name: next(iter(_with_seeds(variant, seeds))) for variant in variants}
    _write_metrics(output / "metrics.json", results, scored_runs, seeds)
    _write_table(output / "metrics.csv", results, scored_runs)
    write_report(
        output,
        title=title,
        intro=intro,
        models=results,
        class_names=legend.class_names,
        class_colors=legend.class_colors,
        examples=read_examples(
            spread(pairs, num_examples), {name: labels[training.name] for name, training in shown.items()}
        ),
        settings=_settings(variants[0].recipe, seeds) | (settings or {}),
        evaluations={result.name: own[0] for result, own in zip(results, scored_runs, strict=True)},
        places=places_section(
            scored[0],
            [(labels[trainings[0].name][truth.name], truth) for _, truth in pairs],
            {truth.name: image for image, truth in pairs},
        ),
        runs=runs_of,
        outputs={"image": os.path.relpath(pairs[0][0].path, output)}
        | {
            f"labels by {name}": f"predictions/{training.slug}/{pairs[0][0].name}.ome.zarr"
            for name, training in shown.items()
        },
        ignore=ignore,
        overwrite=True,  # of the page of the trainings; an earlier report was checked at the start
    )
    return results


def _open_test(data: DataConfig, test: Path) -> list[tuple[Slide, Slide]]:
    """The test slides; classes that annotations do not state have the values of training."""
    slides, annotations = list_slides(test, "test"), data.annotations
    if annotations is None and any(slide.labels is not None and is_annotation(slide.labels) for slide in slides):
        annotations = config_of(open_pairs(list_slides(Path(data.train), "train")[:1])[0][1])
    return open_pairs(slides, annotations=annotations, pixels=data.pixels)


def _check_output(output: Path, *, resume: bool, overwrite: bool) -> None:
    is_own = resume and (output / "runs").is_dir()
    for file in (output / "metrics.json", output / "index.html"):
        if file.exists() and not (is_own or overwrite):
            raise ExistsError(
                file, hint="Choose another output, or pass --resume to go on with it, or --overwrite to replace it."
            )


def check_test_slides(recipe: Recipe, pairs: Sequence[LabelledSlide]) -> None:
    """Refuse test slides that a model of this recipe cannot label, or whose labels cannot be scored.

    Raises:
        InputError: the first of them.
    """
    model = recipe.model
    for image, truth in pairs:
        if (image.ndim, image.num_channels) != (model.ndim, model.in_channels):
            raise InputError(
                image.path,
                expected=f"{model.in_channels} channels and {model.ndim} axes, as the model takes",
                got=f"{image.num_channels} channels and {image.ndim} axes",
            )
        finest = with_levels(image, model.levels).level_shape(model.levels[0])
        if truth.shape != finest:
            raise InputError(truth.path, expected=f"shape {finest}, as {image.path} has", got=f"shape {truth.shape}")
    # the truth scored against itself: one channel of known classes
    evaluate_slides([(truth, truth) for _, truth in pairs], _num_classes(recipe), ignore=recipe.data.ignore_labels)


def _coarse_levels(recipe: Recipe) -> list[Level]:
    """Levels of a model at which any labels can be read; they lie on the pixels of its finest."""
    first, *coarse = recipe.model.levels
    is_whole = [all(f == int(f) for f in level_factors(level, recipe.model.ndim)) for level in coarse]
    return [level for level, whole in zip(coarse, is_whole, strict=True) if whole and first == 1]


def _num_classes(recipe: Recipe) -> int:
    assert recipe.model.num_classes is not None  # `complete` counted them
    return recipe.model.num_classes


def _result(
    variant: Variant, runs: Sequence[Trained], scored: Sequence[Evaluation], first: Sequence[Evaluation]
) -> ModelResult:
    shown = scored[0].foreground
    by_seed = [own.pooled.mean_dice for own in scored]
    gains = [one.pooled.mean_dice - two.pooled.mean_dice for one, two in zip(first, scored, strict=True)]
    return ModelResult(
        name=variant.name,
        description=variant.description,
        dice=dict(zip(scored[0].names(shown), _mean_dice(scored, shown), strict=True)),
        mean_dice=float(np.mean(by_seed)),
        by_seed=by_seed if len(scored) > 1 else (),
        behind=None if scored is first else paired_difference(first, scored),
        behind_by_seed=None if scored is first else seed_interval(gains),
        curves=runs[0].curves,
        seconds=float(np.mean([run.seconds for run in runs])),
        parameters=runs[0].parameters,
    )


def _mean_dice(scored: Sequence[Evaluation], shown: Sequence[int]) -> list[float]:
    """Dice of each class, mean over the seeds that have one."""
    dice = np.stack([own.pooled.dice[list(shown)] for own in scored])
    known = ~np.isnan(dice)
    with np.errstate(invalid="ignore"):
        return list((np.where(known, dice, 0).sum(axis=0) / known.sum(axis=0)).tolist())


def paired_difference(first: Sequence[Evaluation], other: Sequence[Evaluation]) -> Interval | None:
    """Bootstrap interval of the mDSC of one model minus that of another, both on the same draws of slides.

    Args:
        first: scores of the one model, of each training seed.
        other: scores of the other, of as many seeds; the mDSC of a draw is the mean over the seeds.

    Returns:
        None if there are fewer than `FEWEST_SLIDES`, or no score.
    """
    if len(first[0].slides) < FEWEST_SLIDES:
        return None

    def difference(times: NDArray[np.int64]) -> Mapping[str, float]:
        one, two = (np.mean([s.summary(times)["mean_dice"] for s in scored]) for scored in (first, other))
        return {"mean_dice": float(one - two)}

    interval = bootstrap_intervals(difference, len(first[0].slides))["mean_dice"]
    return None if np.isnan(interval).any() else interval


def _write_table(path: Path, results: Sequence[ModelResult], scored: Sequence[Sequence[Evaluation]]) -> None:
    """One line for each model; a score that does not exist is empty."""
    rows: list[Row] = []
    for result, own in zip(results, scored, strict=True):
        slide_mean = float(np.mean([one.mean_slide_dice for one in own]))
        at_levels = zip(*(one.level_table()[1:] for one in own), strict=True)
        coarse = {f"mDSC level {at[0]['level']}": float(np.mean([row["mDSC"] for row in at])) for at in at_levels}
        dice = {"mDSC": result.mean_dice} | dict(result.dice) | {"mean slide mDSC": slide_mean} | coarse
        low, high = seed_interval(result.by_seed, within=(0, 1)) or (None, None)
        seeds = {"mDSC low": low, "mDSC high": high} if result.by_seed else {}
        rows.append(
            {"model": result.name}
            | {name: None if score is None else round(score, 4) for name, score in (dice | seeds).items()}
            | {"parameters": result.parameters, "training minutes": round(result.seconds / 60, 1)}
        )
    write_rows(path, rows)


def _write_metrics(
    path: Path, results: Sequence[ModelResult], scored: Sequence[Sequence[Evaluation]], seeds: Sequence[int]
) -> None:
    metrics = {}
    for result, own in zip(results, scored, strict=True):
        of_seeds = [one.to_dict() for one in own]
        metrics[result.name] = {
            "parameters": result.parameters,
            "training_seconds": round(result.seconds, 1),
            "behind_first": result.behind,
        } | (
            {
                "mean_dice": result.mean_dice,
                "mean_dice_interval": seed_interval(result.by_seed, within=(0, 1)),
                "behind_first_by_seed": result.behind_by_seed,
                "seeds": dict(zip(map(str, seeds), of_seeds, strict=True)),
            }
            if result.by_seed
            else of_seeds[0]
        )
    write_whole(path, (json.dumps(metrics, indent=2) + "\n").encode())


def _check_seeds(seeds: Sequence[int]) -> None:
    if len(set(seeds)) != len(seeds) or any(seed < 0 for seed in seeds):
        raise InputError("seeds", expected="different numbers from 0", got=list(seeds))


def _with_seeds(variant: Variant, seeds: Sequence[int]) -> list[Variant]:
    """The trainings of a model: one with each seed, or one with that of its recipe."""
    return [
        replace(
            variant,
            name=f"{variant.name} seed {seed}",
            recipe=replace(variant.recipe, run=replace(variant.recipe.run, seed=seed)),
        )
        for seed in seeds
    ] or [variant]


def _settings(recipe: Recipe, seeds: Sequence[int]) -> dict[str, object]:
    data, encoder = recipe.data, getattr(recipe.model, "encoder", None)
    sizes = (
        {}
        if encoder is None
        else {
            "patch": f"{encoder.patch_size} px",
            "encoder": f"{encoder.num_layers} layers, width {encoder.dim}, {encoder.heads} heads",
        }
    )
    return {
        "levels": ", ".join(map(level_name, recipe.model.levels)),
        "crop": f"{data.crop_size} px per level",
        **sizes,
        "training": f"{recipe.run.epochs} epochs of {data.samples_per_epoch} crops, {data.batch_size} per step",
        "learning rate": f"{recipe.optim.lr:g}, encoder {recipe.optim.lr * recipe.optim.encoder_lr_factor:g}",
        "seed": ", ".join(map(str, seeds)) or recipe.run.seed,
    }
