import csv
import shutil
from dataclasses import replace

import numpy as np
import pytest
import yaml
from PIL import Image

from muvit.cli import main
from muvit.data.splits import SplitConfig
from muvit.data.tables import SlideFiles, read_slides, write_slides
from muvit.errors import ExistsError, InputError
from muvit.evaluation import cross_validation
from muvit.evaluation.cross_validation import cross_validate
from muvit.evaluation.results import Row
from muvit.models.encoder import EncoderConfig
from muvit.models.segmenter import SegmenterConfig
from muvit.training.fit import train_segmenter
from muvit.training.recipes import DataConfig, Recipe
from muvit.training.run_config import RunConfig

PIXELS = 32 * 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six slides of three patients, two of each."""
    folder, rng = tmp_path_factory.mktemp("slides"), np.random.default_rng(0)
    slides = []
    for i in range(6):
        labels = np.zeros((32, 40), np.uint8)
        labels[:, 10 + 3 * i :] = 1
        files = [folder / kind / f"s{i}.png" for kind in ("images", "labels")]
        for file, values in zip(files, (40 + 120 * labels + rng.integers(0, 40, labels.shape), labels), strict=True):
            file.parent.mkdir(exist_ok=True)
            Image.fromarray(values.astype(np.uint8)).save(file)
        slides.append(SlideFiles(image=files[0], labels=files[1], group=f"p{i // 2}", weight=1 + i))
    write_slides(folder / "slides.csv", slides)
    return folder


@pytest.fixture(scope="module")
def recipe(folder):
    return Recipe(
        data=DataConfig(train=str(folder / "slides.csv"), crop_size=16, samples_per_epoch=4, batch_size=4),
        model=SegmenterConfig(
            encoder=EncoderConfig(levels=(1, 2), patch_size=4, dim=16, num_layers=2, heads=2),
            decoder_widths=(8, 8, 4),
            stem_width=4,
        ),
        run=RunConfig(epochs=1, accelerator="cpu", progress=False, pictures=0, folds=3),
    )


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    output = tmp_path_factory.mktemp("folds") / "cv"
    return output, cross_validate(recipe, output)


def groups(slides, split):
    return {slide.group for slide in slides if slide.split == split}


def test_each_slide_is_scored_once_by_a_model_that_has_not_seen_its_patient(finished):
    output, result = finished
    seen = []
    for fold, scored in result.folds.items():
        slides = read_slides(output / f"fold_{fold}" / "slides.csv")
        assert not groups(slides, "train") & groups(slides, "val")
        assert {slide.name for slide in scored.slides} == {s.name for s in slides if s.split == "val"}
        seen += [slide.name for slide in scored.slides]
    assert sorted(seen) == [f"s{i}" for i in range(6)]
    assert result.pooled.confusion.sum() == 6 * PIXELS
    np.testing.assert_array_equal(result.pooled.confusion, sum(scored.confusion for scored in result.folds.values()))


def test_the_table_has_a_line_for_each_fold_and_for_all(finished):
    output, result = finished
    with (output / "folds.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert [row["fold"] for row in rows] == ["0", "1", "2", "all", "mean of folds", "deviation of folds"]
    assert [row["slides"] for row in rows] == ["2", "2", "2", "6", "", ""]
    scores = np.array([float(row["mDSC"]) for row in rows])
    np.testing.assert_allclose(scores[3], result.pooled.pooled.mean_dice, atol=1e-4)
    np.testing.assert_allclose(scores[4:], [scores[:3].mean(), scores[:3].std()], atol=2e-4)
    assert all(float(row["low"]) <= float(row["mDSC"]) <= float(row["high"]) for row in rows[:4])
    assert result.lines()[3].startswith(f"all                 mDSC {scores[3]:.3f}, 95 % interval ")


def test_a_resumed_cross_validation_trains_only_what_is_missing(finished, recipe, tmp_path, monkeypatch):
    output = shutil.copytree(finished[0], tmp_path / "cv")
    shutil.rmtree(output / "fold_1")
    weights = (output / "fold_2" / "last" / "model.safetensors").read_bytes()
    division = (output / "slides.csv").read_bytes()
    trained = []

    def train(own, run, **options):
        trained.append((run.name, options["resume"]))
        return train_segmenter(own, run, **options)

    monkeypatch.setattr(cross_validation, "train_segmenter", train)
    again = cross_validate(recipe, output, resume=True)
    assert trained == [("fold_0", True), ("fold_1", False), ("fold_2", True)]
    assert (output / "fold_2" / "last" / "model.safetensors").read_bytes() == weights
    assert (output / "slides.csv").read_bytes() == division
    np.testing.assert_array_equal(again.pooled.confusion, finished[1].pooled.confusion)
    with pytest.raises(ExistsError, match=r"cv: exists already and is not overwritten\. Pass --resume"):
        cross_validate(recipe, output)


def test_a_single_fold_trains_on_the_same_slides(finished, recipe, tmp_path):
    alone = replace(recipe, run=replace(recipe.run, fold=2))
    result = cross_validate(alone, tmp_path / "cv")
    assert sorted(f.name for f in (tmp_path / "cv").iterdir()) == ["fold_2", "slides.csv"]
    np.testing.assert_array_equal(result.folds[2].confusion, finished[1].folds[2].confusion)
    assert (tmp_path / "cv" / "fold_2" / "last" / "model.safetensors").read_bytes() == (
        finished[0] / "fold_2" / "last" / "model.safetensors"
    ).read_bytes()


def test_a_run_keeps_its_split_when_it_is_resumed(recipe, folder, tmp_path):
    files = shutil.copytree(folder, tmp_path / "slides")
    data = replace(recipe.data, train=str(files), split=SplitConfig(val=0.4, seed=1))
    single = replace(recipe, data=data, run=replace(recipe.run, folds=None))
    train_segmenter(single, tmp_path / "run")
    before = (tmp_path / "run" / "slides.csv").read_bytes()
    split = {slide.name: slide.split for slide in read_slides(tmp_path / "run" / "slides.csv")}
    assert sorted(split.values()) == ["train"] * 4 + ["val"] * 2
    for kind in ("images", "labels"):  # slides that would be divided, too
        for i in range(6):
            shutil.copy(files / kind / f"s{i}.png", files / kind / f"new{i}.png")
    longer = replace(single, run=replace(single.run, epochs=2))
    train_segmenter(longer, tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "slides.csv").read_bytes() == before
    for kind in ("images", "labels"):
        (files / kind / "s0.png").unlink()
    with pytest.raises(InputError, match=r"slides\.csv, line .: expected a file .*s0\.png, got nothing there"):
        train_segmenter(longer, tmp_path / "run", resume=True)


def test_the_command_trains_all_folds(recipe, folder, tmp_path, monkeypatch, capfd):
    rows: list[Row] = [{"fold": "all", "mDSC": 0.5, "low": 0.4, "high": 0.6}]
    monkeypatch.setattr(cross_validation.CrossValidation, "rows", lambda self: rows)
    seen = []

    def fake(recipe, output, **options):
        seen.append((recipe.run.folds, recipe.run.fold, options))
        return cross_validation.CrossValidation(folds={})

    monkeypatch.setattr(cross_validation, "cross_validate", fake)
    settings = {"data": {"train": str(folder / "slides.csv")}, "model": {"encoder": {"levels": [1, 2]}}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(settings))
    command = ["train", "--config", str(tmp_path / "r.yaml"), "--output", str(tmp_path / "cv"), "--run.folds", "3"]
    assert main([*command, "--resume"]) == 0
    assert seen == [(3, None, {"resume": True, "overwrite": False})]
    assert "all                 mDSC 0.500, 95 % interval 0.400 to 0.600" in capfd.readouterr().out
    assert main([*command, "--run.fold", "3"]) != 0
    assert "run.fold: expected a number below run.folds = 3, got 3" in capfd.readouterr().err


def test_settings_that_contradict_a_cross_validation_are_refused(recipe, tmp_path):
    with pytest.raises(InputError, match=r"run\.folds: expected no data\.val: the folds validate, got there"):
        replace(recipe, data=replace(recipe.data, val="there"))
    with pytest.raises(InputError, match=r"run\.fold: expected one of the folds, to train a single model, got None"):
        train_segmenter(recipe, tmp_path / "run")
