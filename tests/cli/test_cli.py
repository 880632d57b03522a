import json
import re
from importlib import import_module

import numpy as np
import pytest
import yaml
from jsonargparse import ArgumentParser
from PIL import Image

from muvit import __version__
from muvit.cli import VERBS, main
from muvit.cli.parser import Parser
from muvit.data.slides.open import open_slide
from muvit.settings import setting_types

RECIPE = """
data:
  crop_size: 32
  normalization: {kind: range, high: 160}
  samples_per_epoch: 8
  val_samples: 4
  batch_size: 4
model:
  encoder: {in_channels: 1, levels: [1, 4], patch_size: 4, dim: 16, num_layers: 2, heads: 2}
  num_classes: 3
  decoder_widths: [8, 8, 4]
  stem_width: 4
run: {epochs: 9, accelerator: cpu, pictures: 1, progress: false}
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Images, a recipe and a model, each made by a command."""
    folder = tmp_path_factory.mktemp("work")
    data, recipe = folder / "data", folder / "recipe.yaml"
    recipe.write_text(RECIPE)
    counts = ["--train", "1", "--val", "1", "--test", "1", "--size_px", "512", "--workers", "1"]
    assert run("synthetic", "--output", data, *counts) == 0
    code = run(
        *("train", "--config", recipe, "--output", folder / "run", "--run.epochs", "1"),
        *("--data.train", data / "train", "--data.val", data / "val"),
    )
    assert code == 0
    return folder


def run(*argv):
    return main([str(argument) for argument in argv])


def image_of(folder):
    return next((folder / "images").iterdir())


def said(capfd):
    """What the command printed, and its complaints: what is left of the terminal's output without progress bars."""
    out, err = capfd.readouterr()
    lines = err.replace("\r", "\n").splitlines()
    return out, [line for line in lines if line.strip() and not re.search(r"\[\d\d:\d\d", line)]


# -- help --------------------------------------------------------------------------------------------------------------


def test_the_version_is_told(capfd):
    assert run("--version") == 0
    assert __version__ in capfd.readouterr().out


def test_help_lists_every_verb(capfd):
    assert run("--help") == 0
    text = " ".join(capfd.readouterr().out.split())
    for verb, summary in VERBS.items():
        assert verb in text
        assert summary in text


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_of_a_verb_is_explained(capfd, verb):
    parser = Parser()
    import_module(f"muvit.cli.{verb.replace('-', '_')}").add_arguments(parser)
    actions = [action for action in parser._actions if "--help" not in action.option_strings]
    assert actions
    for action in actions:
        assert action.help, action.option_strings or action.dest
        assert "SUPPRESS" not in action.help
        assert len(action.help.split()) >= 2, action.option_strings or action.dest
    assert run(verb, "--help") == 0
    text = capfd.readouterr().out
    sections = {name.rpartition(".")[0] for name, _ in setting_types(parser.recipe)} if parser.recipe else set()
    for name in ((action.option_strings or [action.dest])[0] for action in actions):
        assert name in text or name.strip("-").removesuffix(".help") in sections
    assert not re.search(r"<class|Optional\[|Union\[|Literal\[|Config\b", text)
    assert text.startswith(f"usage: muvit {verb}")


@pytest.mark.parametrize("verb", ["train", "pretrain", "train-classifier", "compare"])
def test_help_of_a_recipe_is_grouped_by_its_sections(capfd, verb):
    assert run(verb, "--help") == 0
    usage, sentence, *_ = text = capfd.readouterr().out.split("\n\n")
    required = " --test FOLDER" if verb == "compare" else ""
    assert usage == f"usage: muvit {verb} --config RECIPE --output FOLDER{required} [--section.key VALUE ...]"
    assert " ".join(sentence.split()).startswith(
        f"{VERBS[verb][0].upper()}{VERBS[verb][1:]}. The recipe is a YAML file."
    )
    parser = Parser()
    import_module(f"muvit.cli.{verb.replace('-', '_')}").add_arguments(parser)
    titles = [line for part in text for line in part.splitlines() if re.fullmatch(r"[\w.]+:", line)]
    names = dict(setting_types(parser.recipe))
    assert set(titles) - {"recipe:"} == {"options:", *(f"{name.rpartition('.')[0]}:" for name in names if "." in name)}
    assert titles.index("model:") < titles.index("model.encoder:") if verb != "pretrain" else True
    for name in names:  # of optional sections too
        assert re.search(rf"^  --{re.escape(name)} \S", "\n\n".join(text), re.M), name


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["trian"], "; did you mean train?"),
        (["prepare", "kpi"], "; did you mean kpis?"),
        (["study", "nois"], "; did you mean noise?"),
        (["info", "--jso", "x"], "there is no option --jso; did you mean --json?"),
        (["predict", "m", "a.png", "--output", "o", "--engine", "dask"], "no option --engine; did you mean --backend?"),
        (
            ["train", "--config", "{whole}", "--run.epoch", "3"],
            "there is no option --run.epoch; did you mean --run.epochs?",
        ),
        (["train", "--config", "{whole}", "--init.encodr", "e"], "no setting init.encodr; did you mean init.encoder?"),
        (
            ["train", "--config", "{typo}"],
            "typo.yaml: model: there is no setting 'num_clases'; did you mean num_classes?",
        ),
        (["train", "--config", "{twice}"], "twice.yaml: expected settings in YAML, got the key 'run' twice, at lines"),
        (
            ["train", "--config", "{whole}", "--model.encoder", "null"],
            "model.encoder: expected settings as name: value",
        ),
        (["train", "--config", "{whole}", "--optim.lr", "fast"], "optim.lr: expected a number, got fast"),
        (["train"], "required: data.train, model.encoder.levels"),
    ],
)
def test_misspelt_words_are_named_with_the_nearest_right_one(tmp_path, capfd, argv, said):
    whole = RECIPE.replace("data:", "data:\n  train: x")
    files = {"whole": whole, "typo": whole.replace("num_classes", "num_clases"), "twice": whole + "run: {epochs: 1}\n"}
    for name, text in files.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    more = ["--output", tmp_path / "new"] if argv[0] == "train" else []
    assert run(*(a.format(**{name: tmp_path / f"{name}.yaml" for name in files}) for a in argv), *more) == 2
    told = capfd.readouterr().err
    assert said in told
    assert told.count("\n") == 1


@pytest.mark.parametrize("nested", ["InitConfig", "MAEConfig", "EncoderConfig", "SegmenterConfig", "Augmentation"])
def test_every_field_of_a_nested_setting_is_explained(nested):
    homes = {"InitConfig": "training.recipes", "MAEConfig": "models.mae", "EncoderConfig": "models.encoder"}
    homes |= {"SegmenterConfig": "models.segmenter", "Augmentation": "data.crops.augment"}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(getattr(import_module(f"muvit.{homes[nested]}"), nested), "x")
    unexplained = [a.dest for a in parser._actions if a.option_strings and not a.help]
    assert unexplained == []


# -- from images to scores -------------------------------------------------------------------------------------------


def test_images_are_converted_to_pyramids_of_the_same_pixels(tmp_path, capfd):
    pixels = np.random.default_rng(0).integers(0, 255, (300, 280, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    labels = np.tile(np.arange(3, dtype=np.uint8), (300, 100))[:, :280]
    Image.fromarray(labels).save(tmp_path / "mask.png")
    (tmp_path / "classes.json").write_text('{"0": "background", "1": "cell", "2": "rim"}')
    options = ["--levels", "[1,4]", "--pixel_size_um", "0.5", "--channel_names", "[red,green,blue]"]
    assert run("convert", tmp_path / "photo.png", "--output", tmp_path / "out", *options) == 0
    assert (
        run(
            *("convert", tmp_path / "mask.png", "--output", tmp_path / "mask.zarr", "--kind", "label"),
            *("--classes", tmp_path / "classes.json"),
        )
        == 0
    )
    out, complaints = said(capfd)
    assert out.split() == [str(tmp_path / "out" / "photo.ome.zarr"), str(tmp_path / "mask.zarr")]
    assert complaints == []
    image, mask = open_slide(tmp_path / "out" / "photo.ome.zarr"), open_slide(tmp_path / "mask.zarr")
    assert np.array_equal(image.read(1, (0, 0), image.shape), np.moveaxis(pixels, -1, 0))
    assert (image.levels, image.pixel_size_um) == ((1, 4), (0.5, 0.5))
    assert image.channel_names == ("red", "green", "blue")
    assert np.array_equal(mask.read(1, (0, 0), mask.shape)[0], labels)
    assert mask.label_names == {0: "background", 1: "cell", 2: "rim"}

    assert run("info", image.path, mask.path, "--json") == 0
    facts = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert facts[0]["shape"] == [300, 280]
    assert facts[0]["levels"] == {"1": [300, 280], "4": [75, 70]}
    assert facts[0]["pixel_size_um"] == [0.5, 0.5]
    assert facts[0]["dtype"] == "uint8"
    assert facts[1]["classes"] == {"0": "background", "1": "cell", "2": "rim"}
    assert run("info", image.path) == 0
    text = capfd.readouterr().out
    assert "300 x 280" in text
    assert "0.5 x 0.5" in text


def test_overrides_come_before_the_recipe(work):
    settings = yaml.safe_load((work / "run" / "recipe.yaml").read_text())
    assert settings["run"]["epochs"] == 1
    assert settings["data"]["samples_per_epoch"] == 8
    assert settings["data"]["train"] == str(work / "data" / "train")


def test_a_slide_is_labelled_and_scored(work, capfd):
    test = work / "data" / "test"
    image = open_slide(image_of(test))
    assert run("predict", work / "run" / "best", image.path, "--output", work / "labels", "--batch_size", "64") == 0
    out, complaints = said(capfd)
    written = work / "labels" / f"{image.name}.ome.zarr"
    assert out.split() == [str(written)]
    assert complaints == []
    labels = open_slide(written)
    assert labels.shape == image.shape
    assert labels.label_names == {0: "background", 1: "outer cell", 2: "inner cell"}

    scores = work / "scores" / "run.json"
    assert run("evaluate", work / "labels", test / "labels", "--output", scores) == 0
    slides, classes, totals = (block.splitlines() for block in capfd.readouterr().out.split("\n\n"))
    assert slides[0].split() == ["slide", "outer", "cell", "inner", "cell", "mDSC"]
    result = json.loads(scores.read_text())
    assert float(slides[-1].split()[-1]) == pytest.approx(result["pooled"]["mean_dice"], abs=1e-4)
    assert classes[0].split() == ["class", "Dice", "IoU", "boundary", "F1", "HD95"]
    for line, name in zip(classes[1:4], result["class_names"], strict=True):
        assert line.startswith(name)
        shown = [float(number) for number in line.removeprefix(name).split()]
        stored = [result["pooled"][score][name] for score in ("dice", "iou", "boundary_f1", "hd95")]
        assert shown == pytest.approx([float("nan") if v is None else v for v in stored], abs=1e-4, nan_ok=True)
    expected = [result["pooled"][name] for name in ("mean_dice", "mean_iou", "mean_foreground_iou", "accuracy")]
    expected.append(result["mean_slide_dice"])
    assert [float(line.split()[-1]) for line in totals] == pytest.approx(expected, abs=1e-4)
    assert sum(map(sum, result["confusion"])) == 512 * 512
    guess, truth = (
        s.read(1, (0, 0), s.shape)[0]
        for s in (labels, open_slide(image_of(test).parents[1] / "labels" / image.path.name))
    )
    assert result["pooled"]["accuracy"] == pytest.approx((guess == truth).mean())


def test_a_perfect_prediction_scores_one(work, capfd):
    labels = work / "data" / "test" / "labels"
    assert run("evaluate", labels, labels) == 0
    tables = capfd.readouterr().out
    slides = tables.split("\n\n")[0]
    assert set(re.findall(r"\b\d\.\d{4}\b", slides)) == {"1.0000"}
    assert re.search(r"^mDSC +1\.0000$", tables, re.M)


def test_a_run_is_resumed_and_its_result_named(work, capfd):
    arguments = ["train", "--config", work / "recipe.yaml", "--output", work / "run", "--run.epochs", "2", "--resume"]
    data = work / "data"
    assert run(*arguments, "--data.train", data / "train", "--data.val", data / "val") == 0
    out, complaints = said(capfd)
    assert out.split() == [str(work / "run" / "best")]
    assert complaints == []
    assert len(list((work / "run" / "pictures").glob("epoch_*.png"))) == 2


# -- bad input ---------------------------------------------------------------------------------------------------------


def contents(folder):
    return sorted(str(path) for path in folder.rglob("*"))


USAGE = {
    "no verb": [],
    "unknown verb": ["teach"],
    "unknown option": ["info", "x.png", "--colour"],
    "missing option": ["convert", "x.png"],
    "wrong type": ["synthetic", "--output", "{new}", "--train", "many"],
    "wrong choice": ["convert", "x.png", "--output", "{new}", "--kind", "film"],
    "missing recipe": ["train", "--config", "{new}.yaml", "--output", "{new}"],
    "recipe of something else": ["train", "--config", "{work}/poem.yaml", "--output", "{new}"],
    "unknown setting": ["train", "--config", "{work}/recipe.yaml", "--output", "{new}", "--data.speed", "3"],
    "unknown setting in the recipe": ["train", "--config", "{work}/misspelt.yaml", "--output", "{new}"],
    "missing setting": ["train", "--config", "{work}/recipe.yaml", "--output", "{new}"],
    "setting of a wrong type": ["train", "--config", "{work}/recipe.yaml", "--output", "{new}", "--optim.lr", "fast"],
    "unknown choice": ["train", "--config", "{work}/recipe.yaml", "--output", "{new}", "--run.accelerator", "abacus"],
    "recipe with a tag": ["train", "--config", "{work}/tagged.yaml", "--output", "{new}"],
}  # fmt: skip


@pytest.mark.parametrize("argv", USAGE.values(), ids=USAGE)
def test_arguments_that_do_not_fit_end_with_2_and_one_sentence(work, tmp_path, capfd, argv):
    (work / "poem.yaml").write_text("- roses\n- are red\n")
    (work / "misspelt.yaml").write_text(RECIPE.replace("crop_size", "cropsize"))
    (work / "tagged.yaml").write_text(f'data: !!python/object/apply:os.mkdir ["{tmp_path / "proof"}"]\n')
    before = contents(tmp_path)
    assert run(*(a.format(new=tmp_path / "new", work=work) for a in argv)) == 2
    out, complaints = said(capfd)
    assert out == ""
    assert len(complaints) == 1
    assert complaints[0].startswith("muvit")
    assert "--help" in complaints[0]
    assert "Traceback" not in complaints[0]
    assert contents(tmp_path) == before


@pytest.fixture
def bad(work, tmp_path):
    """Files that each have one fault."""
    folder = tmp_path / "bad"
    folder.mkdir()
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(folder / "grey.png")
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(folder / "rgb.png")
    Image.fromarray(np.full((64, 64), 9, np.uint8)).save(folder / "nine.png")
    (folder / "cut.png").write_bytes((folder / "rgb.png").read_bytes()[:50])
    (folder / "text.png").write_text("hello")
    (folder / "broken.json").write_text("{")
    (folder / "none.json").write_text("{}")
    (folder / "huge.json").write_text('{"1": "a", "1000000000": "b"}')
    (folder / "deep.json").write_text("[" * 100_000)
    (folder / "taken").mkdir()
    (folder / "taken" / "grey.ome.zarr").mkdir()
    (folder / "taken" / "scores.json").write_text("dear")
    (folder / "model").mkdir()
    (folder / "model" / "config.yaml").write_text("width: 3\n")
    return folder


TRAIN = ["train", "--config", "{work}/recipe.yaml", "--output", "{new}", "--data.train", "{work}/data/train"]
PREDICT = ["predict", "{work}/run/best", "{work}/data/test/images/00002.ome.zarr", "--output", "{new}"]
FAILURES = {
    "missing image": (["info", "{bad}/none.png"], "none.png"),
    "truncated image": (["convert", "{bad}/cut.png", "--output", "{new}"], "cut.png, level 1"),
    "no image": (["convert", "{bad}/text.png", "--output", "{new}"], "text.png: expected"),
    "existing pyramid": (["convert", "{bad}/grey.png", "--output", "{bad}/taken"], "grey.ome.zarr: exists already"),
    "several images to one": (
        ["convert", "{bad}/grey.png", "{bad}/rgb.png", "--output", "{new}.zarr"],
        "--output: expected a folder",
    ),
    "labels in colour": (
        ["convert", "{bad}/rgb.png", "--output", "{new}", "--kind", "label"],
        "rgb.png: expected labels",
    ),
    "levels not ascending": (
        ["convert", "{bad}/grey.png", "--output", "{new}", "--levels", "[4,1]"],
        "levels: expected",
    ),
    "channel names": (
        ["convert", "{bad}/rgb.png", "--output", "{new}", "--channel_names", "[red]"],
        "channel_names: expected",
    ),
    "pixel size": (
        ["convert", "{bad}/rgb.png", "--output", "{new}", "--pixel_size_um", "-1"],
        "pixel_size_um: expected",
    ),
    "class names": (
        ["convert", "{bad}/grey.png", "--output", "{new}", "--kind", "label", "--classes", "{bad}/broken.json"],
        "broken.json: expected JSON",
    ),
    "class names of an image": (
        ["convert", "{bad}/grey.png", "--output", "{new}", "--classes", "{bad}/broken.json"],
        "expected",
    ),
    "no images": (["synthetic", "--output", "{new}", "--train", "0", "--val", "0", "--test", "0"], "expected"),
    "negative seed": (["synthetic", "--output", "{new}", "--size_px", "512", "--seed", "-1"], "seed: expected"),
    "existing data set": (["synthetic", "--output", "{work}/data", "--train", "1"], "data: exists already"),
    "no training slides": ([*TRAIN, "--data.train", "{bad}/none"], "none"),
    "channels": ([*TRAIN, "--model.encoder.in_channels", "3"], ".ome.zarr: expected 3 channel(s)"),
    "label values": ([*TRAIN, "--model.num_classes", "2"], ".ome.zarr: expected label values from 0 to 1, got 2"),
    "level order": ([*TRAIN, "--model.encoder.levels", "[4,1]"], "levels: expected different levels in asc"),
    "missing level": ([*TRAIN, "--model.encoder.levels", "[1,3.5]"], "level 3.5: expected one of its stored levels"),
    "crop and patch": ([*TRAIN, "--data.crop_size", "30"], "multiples of (4, 4), as the model takes, got (30, 30)"),
    "batch size": ([*TRAIN, "--data.batch_size", "0"], "data.batch_size: expected a whole number >= 1, got 0"),
    "normalisation": ([*TRAIN, "--data.normalization.kind", "none"], "normalization: expected a kind out of"),
    "devices": (
        [*TRAIN, "--run.accelerator", "gpu", "--run.devices", "99", "--data.samples_per_epoch", "999"],
        "run.devices: expected at most",
    ),
    "existing run": ([*TRAIN[:4], "{work}/run", *TRAIN[5:]], "--resume"),
    "resumed with other settings": (
        [*TRAIN[:4], "{work}/run", *TRAIN[5:], "--resume", "--optim.lr", "1"],
        "expected the settings that the run was started with, got others in data, optim",
    ),
    "nothing to resume": ([*TRAIN, "--resume"], "new: expected an interrupted run"),
    "no model": (["predict", "{bad}/none", *PREDICT[2:]], "none: expected a model folder"),
    "foreign model": (["predict", "{bad}/model", *PREDICT[2:]], "model: expected a model of kind muvit or relay"),
    "slide of other channels": ([*PREDICT[:2], "{bad}/rgb.png", *PREDICT[3:]], "rgb.png: expected 1, as the model has"),
    "slides of one name": ([*PREDICT[:3], *PREDICT[2:]], "slide: expected images of different names"),
    "tiles at once": ([*PREDICT, "--batch_size", "0"], "batch_size: expected a whole number >= 1, got 0"),
    "no such device": ([*PREDICT, "--device", "abacus"], "device"),
    "labels of no class": (
        ["evaluate", "{bad}/nine.png", "{bad}/grey.png", "--num_classes", "2"],
        "expected labels 0 to 1, got 9",
    ),
    "classes unknown": (["evaluate", "{bad}/grey.png", "{bad}/grey.png"], "--num_classes: expected a number"),
    "classes beyond reason": (
        ["evaluate", "{bad}/grey.png", "{bad}/grey.png", "--num_classes", "1000000000"],
        "--num_classes: expected 1 to 4096",
    ),
    "scores of another format": (
        ["evaluate", "{bad}/grey.png", "{bad}/grey.png", "--num_classes", "2", "--output", "{new}.txt"],
        "new.txt: expected a folder, or a file ending in",
    ),
    "names of no class": (
        ["convert", "{bad}/grey.png", "--output", "{new}", "--kind", "label", "--classes", "{bad}/none.json"],
        "none.json: expected names of label values from 0 to 65535, got no names",
    ),
    "names of huge values": (
        ["convert", "{bad}/grey.png", "--output", "{new}", "--kind", "label", "--classes", "{bad}/huge.json"],
        "huge.json: expected names of label values from 0 to 65535, got values 1 to 1000000000",
    ),
    "names in endless lists": (
        ["convert", "{bad}/grey.png", "--output", "{new}", "--kind", "label", "--classes", "{bad}/deep.json"],
        "deep.json: expected JSON that names label values, got lists nested too deeply",
    ),
    "inverted region": ([*PREDICT, "--region", "100,100,10,10"], "y0 < y1 and x0 < x1"),
    "scheduler without dask": ([*PREDICT, "--scheduler", "tcp://x:1"], "scheduler: expected backend dask"),
    "scores exist": (
        ["evaluate", "{bad}/grey.png", "{bad}/grey.png", "--num_classes", "2", "--output", "{bad}/taken/scores.json"],
        "scores.json: exists already",
    ),
    "truth of another shape": (
        ["evaluate", "{bad}/grey.png", "{work}/data/test/labels/00002.ome.zarr", "--num_classes", "3"],
        "expected",
    ),
    "comparison of one level": (
        ["compare", *TRAIN[1:], "--test", "{work}/data/test", "--model.encoder.levels", "[1]"],
        "several levels and true boxes",
    ),
    "comparison without test slides": (["compare", *TRAIN[1:], "--test", "{bad}/none"], "none"),
    "pyramid below a file": (["convert", "{bad}/grey.png", "--output", "{bad}/rgb.png/deep"], "rgb.png"),
    "run below a file": ([*TRAIN[:4], "{bad}/rgb.png/deep", *TRAIN[5:]], "rgb.png"),
    "labels below a file": ([*PREDICT[:4], "{bad}/rgb.png/deep"], "rgb.png"),
    "images below a file": (["synthetic", "--size_px", "512", "--output", "{bad}/rgb.png/deep"], "rgb.png"),
    "scores below a file": (
        ["evaluate", "{bad}/grey.png", "{bad}/grey.png", "--num_classes", "2", "--output", "{bad}/rgb.png/deep.json"],
        "rgb.png",
    ),
    "existing demo": (["demo", "--quick", "--output", "{bad}/taken"], "taken: exists already"),
}  # fmt: skip


@pytest.mark.parametrize("name", ["rgb", "cut"])
def test_of_several_slides_those_that_do_not_fit_are_named_before_any_work(work, bad, tmp_path, capfd, name):
    argv = [*PREDICT[:3], f"{{bad}}/{name}.png", *PREDICT[3:]]
    before = contents(work), contents(tmp_path)
    assert run(*(a.format(new=tmp_path / "new", work=work, bad=bad) for a in argv)) == 1
    out, (first, last) = said(capfd)
    assert out == ""
    assert f"{name}.png: expected 1" in first
    assert f"slides: expected 2 that can be labelled, got 1 that failed: {name}." in last
    assert (contents(work), contents(tmp_path)) == before


@pytest.mark.parametrize("argv, message", FAILURES.values(), ids=FAILURES)
def test_bad_input_ends_with_1_and_one_sentence_and_writes_nothing(work, bad, tmp_path, capfd, argv, message):
    before = contents(work), contents(tmp_path)
    assert run(*(a.format(new=tmp_path / "new", work=work, bad=bad) for a in argv)) == 1
    out, complaints = said(capfd)
    assert out == ""
    assert len(complaints) == 1
    assert complaints[0].startswith("muvit: ")
    assert message in complaints[0]
    assert (contents(work), contents(tmp_path)) == before
