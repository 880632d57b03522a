"""Cross-validation: a model for each part of the slides, trained on the others, and one table of scores."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from muvit.data.crops.preprocessing import Preprocessing
from muvit.data.folders import open_label_images, open_pairs
from muvit.data.slides.slide import Slide
from muvit.data.splits import SlideSets
from muvit.data.tables import write_slides
from muvit.durable import write_whole
from muvit.errors import ExistsError, InputError
from muvit.evaluation.comparison import check_test_slides
from muvit.evaluation.report.runs import LivePage, write_run_page
from muvit.evaluation.results import Row, plain_numbers, write_rows
from muvit.evaluation.scores.bootstrap import BootstrapConfig
from muvit.evaluation.scores.segmentation import Evaluation, evaluate_slides
from muvit.evaluation.side_by_side import choose_devices
from muvit.inference.predict import predict_slide
from muvit.inference.run.plan import AS_PUBLISHED
from muvit.models.segmentation_model import SegmentationModel
from muvit.models.trained import load_model
from muvit.training.fit import train_segmenter
from muvit.training.recipes import Recipe
from muvit.training.resume import has_state
from muvit.training.runs import SLIDES
from muvit.training.slides import complete, recipe_folds


@dataclass(frozen=True, kw_only=True)
class CrossValidation:
    """Scores of the models of a cross-validation, each on the slides that it was not trained on."""

    folds: Mapping[int, Evaluation]
    """By number of the fold."""

    @property
    def pooled(self) -> Evaluation:
        """Scores of all slides together, each labelled by the model that has not seen it."""
        first, *others = self.folds.values()
        return replace(first, slides=sum((fold.slides for fold in others), first.slides))

    def rows(self, bootstrap: BootstrapConfig | None = None) -> list[Row]:
        """Lines of a table: each fold, all slides together, and mean and standard deviation of the folds.

        Columns: ``fold``, ``slides``, ``mDSC`` with the bounds ``low`` and ``high`` of its bootstrap interval over
        slides, ``mean slide mDSC``, and the Dice of each foreground class.
        """
        scored = {str(fold): own for fold, own in self.folds.items()} | {"all": self.pooled}
        rows: list[Row] = []
        for name, own in scored.items():
            values, (low, high) = own.summary(), own.intervals(bootstrap)["mean_dice"]
            dice = {c: values[f"dice/{c}"] for c in own.names(own.foreground)}
            score = {"mDSC": values["mean_dice"], "low": low, "high": high}
            line: dict[str, str | float | int | None] = {"fold": name, "slides": len(own.slides)}
            rows.append(line | score | {"mean slide mDSC": values["mean_slide_dice"]} | dice)
        of_folds = rows[: len(self.folds)]
        for name, statistic in (("mean of folds", np.mean), ("deviation of folds", np.std)):
            row: dict[str, str | float | int | None] = {"fold": name, "slides": None}
            for column in list(rows[0])[2:]:
                known = [value for r in of_folds if not np.isnan(value := float(r[column] or 0.0))]
                is_bound = column in ("low", "high")
                row[column] = None if is_bound or not known else float(statistic(known))
            rows.append(row)
        return rows

    def lines(self) -> list[str]:
        """The mDSC of each line of the table, with its interval, for people."""
        lines = []
        for row in self.rows():
            score, low, high = (float("nan") if row[name] is None else row[name] for name in ("mDSC", "low", "high"))
            interval = f", 95 % interval {low:.3f} to {high:.3f}" if low == low else ""
            lines.append(f"{row['fold']:<20}mDSC {score:.3f}{interval}")
        return lines


def cross_validate(recipe: Recipe, output: Path, *, resume: bool = False, overwrite: bool = False) -> CrossValidation:
    """Train the models of a cross-validation one after another, and score each on the slides that it has not seen.

    Slides are divided once, before the first training; the division is in ``slides.csv``. A validation slide also
    chooses the best epoch of its model (``run.monitor``), as in a single run.

    Args:
        recipe: all settings, with ``run.folds``; with ``run.fold`` only this model is trained and scored.
        output: folder that receives ``fold_<i>``, each a run with the ``predictions`` of its slides, ``slides.csv``,
            and ``folds.csv`` and ``folds.json`` with the scores.
        resume: go on with what was stopped.
        overwrite: begin anew.

    Returns:
        The scores of the models that were trained.

    Raises:
        ExistsError: ``output`` exists, and neither ``resume`` nor ``overwrite`` is set.
        InputError, ReadError: slides, labels or settings do not fit; found before any training.
    """
    output, recipe = Path(output), complete(recipe)
    device = choose_devices(recipe.run)[0]
    runs = _divide(recipe, output, resume=resume, overwrite=overwrite)
    chosen = range(len(runs)) if recipe.run.fold is None else [recipe.run.fold]
    for fold in chosen:
        check_test_slides(
            recipe, open_pairs(runs[fold]["val"], annotations=recipe.data.annotations, pixels=recipe.data.pixels)
        )
    scored: dict[int, Evaluation] = {}
    for fold in chosen:
        run, own = output / f"fold_{fold}", replace(recipe, run=replace(recipe.run, fold=fold))
        before, is_started = _weights(run), resume and has_state(run)
        again, live = overwrite or resume, [LivePage(run)]
        model = train_segmenter(own, run, resume=is_started, overwrite=again, slides=runs[fold], callbacks=live)
        write_run_page(run)
        pairs = open_pairs(runs[fold]["val"], annotations=recipe.data.annotations, pixels=recipe.data.pixels)
        trained = load_model(model, kind=SegmentationModel)
        has_changed = before != _weights(run)  # else the labels are kept
        for image, _ in pairs:
            target = run / "predictions" / f"{image.name}.ome.zarr"
            target.parent.mkdir(exist_ok=True)
            predict_slide(trained, image, target, options=AS_PUBLISHED, device=device, overwrite=has_changed)
        scored[fold] = _score(run / "predictions", pairs, recipe, trained.preprocessing)
    result = CrossValidation(folds=scored)
    if recipe.run.fold is None:
        write_rows(output / "folds.csv", [_rounded(row) for row in result.rows()])
        data = {"folds": {str(k): own.to_dict() for k, own in scored.items()}, "all": result.pooled.to_dict()}
        write_whole(output / "folds.json", (json.dumps(plain_numbers(data), indent=2) + "\n").encode())
    return result


def _divide(recipe: Recipe, output: Path, *, resume: bool, overwrite: bool) -> list[SlideSets]:
    """The slides of each run, as stored or divided now."""
    stored, is_alone = output / SLIDES, recipe.run.fold is not None
    if stored.exists() and (resume or is_alone) and not overwrite:
        return recipe_folds(recipe, stored)
    if output.exists() and any(output.iterdir()) and not is_alone:
        if not (overwrite or resume):
            hint = "Pass --resume to go on with the cross-validation, or --overwrite to begin it anew."
            raise ExistsError(output, hint=hint)
        if not stored.exists():
            raise InputError(output, expected=f"a cross-validation, with {SLIDES}", got="another folder")
    runs = recipe_folds(recipe)
    slides = [slide for run in runs for slide in run["val"]]
    write_slides(stored, [*(replace(slide, split="train") for slide in slides), *runs[0]["test"]])
    return runs


def _weights(run: Path) -> dict[str, str]:
    """Checksums of the models of a run."""
    return {str(f): hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(run.glob("*/model.safetensors"))}


def _score(folder: Path, pairs: Sequence[tuple[Slide, Slide]], recipe: Recipe, legend: Preprocessing) -> Evaluation:
    labels = open_label_images([folder])
    return evaluate_slides(
        [(labels[truth.name], truth) for _, truth in pairs],
        len(legend.class_names),
        ignore=recipe.data.ignore_labels,
        class_names=legend.class_names,
        has_background=legend.has_background,
    )


def _rounded(row: Row) -> Row:
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()}
