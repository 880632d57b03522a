from dataclasses import replace

import numpy as np
import pytest
import yaml
from PIL import Image

from muvit.cli import main
from muvit.errors import InputError
from muvit.models.encoder import EncoderConfig
from muvit.settings import make_settings
from muvit.training.proposal import (
    Choice,
    Cost,
    Machine,
    choose_length,
    choose_model,
    choose_normalization,
    choose_rate,
    choose_sampling,
    choose_views,
    measure_cost,
    nested,
    propose,
    render,
)
from muvit.training.recipes import Recipe
from muvit.training.survey import survey_folder

CPU = Machine(has_gpu=False, memory_bytes=16 << 30, cores=2)
GPU = Machine(has_gpu=True, memory_bytes=40 << 30, cores=16)


def write(folder, image, label, name="a"):
    for kind, pixels in (("images", image), ("labels", label)):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / kind / f"{name}.png")


def cells(shape=(320, 480), width=12):
    """Squares of class 1, a band of class 2, and some pixels of 255."""
    label = np.zeros(shape, np.uint8)
    for y in range(8, shape[0] - width, 4 * width):
        for x in range(8, shape[1] // 2 - width, 4 * width):
            label[y : y + width, x : x + width] = 1
    label[:, -100:] = 2
    label[:4, :4] = 255
    return label


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slides")
    label = cells()
    image = np.where(label == 1, 120, np.where(label == 2, 60, 3)).astype(np.uint8)
    for split in ("train", "val"):
        write(folder / split, image, label)
    return folder


@pytest.fixture(scope="module")
def survey(folder):
    return survey_folder(folder / "train")


def test_classes_are_found_with_their_share_and_width(survey):
    label = cells()
    assert [one.value for one in survey.classes] == [0, 1, 2] and survey.ignored == (255,)
    for one in survey.classes:
        assert one.share == pytest.approx((label == one.value).sum() / (label != 255).sum(), rel=0.05)
    _, small, band = survey.classes
    assert small.width_px == pytest.approx(12, abs=2) and band.width_px > 90
    assert survey.brightness == ((3.0, 120.0),)


@pytest.mark.parametrize(
    "width, extent, machine, levels, crop",
    [
        (12, 480, CPU, [1, 4], 64),
        (20, 480, CPU, [2, 4], 64),
        (4, 1024, CPU, [1, 4, 16], 64),
        (12, 2000, GPU, [1, 4], 256),
        (12, 1e6, GPU, [1, 8, 64], 256),
        (40, 16_000, GPU, [4, 16, 128], 80),
    ],
)
def test_the_finest_level_shows_the_smallest_class_and_the_coarsest_the_tissue(
    survey, width, extent, machine, levels, crop
):
    classes = (survey.classes[0], replace(survey.classes[1], width_px=width), survey.classes[2])
    chosen = nested(choose_views(replace(survey, classes=classes), extent, machine, None))
    found = chosen["model"]["encoder"]["levels"]
    size = chosen["data"]["crop_size"]
    assert size <= (256 if machine.has_gpu else 64) and size % 8 == 0 and size * found[0] <= 320
    assert width / found[0] >= 8 or found[0] == 1
    assert extent / 2 < size * found[-1] <= extent or found[-1] == 64 * found[0]
    if size == crop:
        assert found == levels


def test_pre_trained_encoders_say_levels_and_sizes(survey):
    encoder = EncoderConfig(in_channels=1, levels=(2, 8), dim=64, heads=4, rotary_base=100.0)
    chosen = nested([*choose_views(survey, 1e4, CPU, encoder), *choose_model(survey, CPU, encoder)])
    assert chosen["model"]["encoder"] == {"levels": [2, 8], "dim": 64, "heads": 4, "rotary_base": 100.0}
    (scratch, from_start), (tuned, slowly) = ([c.value for c in choose_rate(e)] for e in (None, encoder))
    assert tuned < scratch and slowly < from_start == 1.0


def test_normalisation_follows_the_brightness_of_the_slides(survey):
    def chosen(dtype, channels, *brightness):
        class Facts:
            num_channels = channels

        Facts.dtype = np.dtype(dtype)
        return choose_normalization(replace(survey, slides=(Facts,), brightness=brightness)).value

    assert chosen("uint8", 3, (20, 130)) == {"kind": "range", "low": 0, "high": 255}
    assert chosen("uint8", 1, (0, 150), (0, 120)) == {"kind": "range", "low": 0, "high": 160}
    assert chosen("uint16", 1, (100, 4000), (90, 3000)) == {"kind": "range", "low": 90.0, "high": 4000.0}
    assert chosen("uint16", 1, (100, 4000), (90, 300)) == {"kind": "percentile"}
    assert chosen("float32", 1, (0.0, 0.0)) == {"kind": "percentile"}


def test_rare_classes_are_drawn_more_often(survey):
    def chosen(*shares):
        classes = tuple(replace(one, share=share) for one, share in zip(survey.classes, shares, strict=True))
        return nested(choose_sampling(replace(survey, classes=classes))).get("data", {}).get("balance")

    assert (chosen(0.5, 0.25, 0.25), chosen(0.9, 0.05, 0.05), chosen(0.6, 0.001, 0.399)) == (
        None,
        "foreground",
        "classes",
    )


def test_batches_fit_into_memory_and_epochs_into_the_time():
    small = Cost(seconds_per_sample=0.05, bytes_per_sample=1 << 26, parameters=10**6)
    chosen = nested(choose_length(small, CPU, 1.0))
    assert (chosen["data"]["batch_size"], chosen["data"]["num_workers"]) == (16, 0)
    assert chosen["run"]["epochs"] * 128 * 16 * 0.05 == pytest.approx(3600, rel=0.05)
    large = replace(small, bytes_per_sample=3 << 30)
    for machine in (CPU, GPU):
        batch = nested(choose_length(large, machine, 1.0))["data"]["batch_size"]
        assert large.memory_bytes(batch) <= machine.memory_bytes / 2 < large.memory_bytes(2 * batch)


def test_a_step_is_measured_as_the_recipe_has_it(folder):
    def cost(crop):
        data = {"train": str(folder / "train"), "crop_size": crop, "ignore_labels": [255]}
        encoder = {"levels": [1, 4], "dim": 16, "num_layers": 3, "heads": 2}
        model = {"kind": "muvit", "encoder": encoder, "decoder_widths": [8, 8, 4, 4], "stem_width": 4}
        return measure_cost(make_settings({"data": data, "model": model}, Recipe, subject="recipe"), CPU)

    small, large = cost(16), cost(32)
    assert small.parameters == large.parameters > 1000
    assert 2 * small.bytes_per_sample < large.bytes_per_sample < 8 * small.bytes_per_sample
    assert small.bytes_per_sample > 2 * 16 * 16 * 4  # at least the pixels
    assert large.memory_bytes(4) == 16 * large.parameters + 4 * large.bytes_per_sample


def test_a_recipe_is_written_in_sections_with_its_reasons():
    choices = [
        Choice(path="data.train", value="a b"),
        Choice(path="model.encoder.levels", value=[1, 4], reason="word " * 60),
        Choice(path="run.epochs", value=3),
        Choice(path="model.kind", value="muvit"),
        Choice(path="data.val", value=None, reason="none"),
    ]
    text = render(choices, ["head", ""])
    assert text.startswith("# head\n#\ndata:\n  train: a b\n  # none\n  val: null\n")
    assert yaml.safe_load(text) == nested(choices)
    assert max(map(len, text.splitlines())) <= 110 and text.count("word") == 60


def test_the_command_writes_a_recipe_that_trains(folder, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("muvit.training.proposal.this_machine", lambda: CPU)
    file = tmp_path / "recipe.yaml"
    assert main(["init", str(folder), "--output", str(file)]) == 0
    out = capfd.readouterr().out
    assert "1 slides (.png) of 320 x 480 px" in out and out.endswith(f"{file}\n")
    with Image.open(tmp_path / "recipe.png") as picture:  # three samples of two levels with their labels, each twice
        assert picture.height > 3 * 256 and np.asarray(picture).std() > 0
    values = yaml.safe_load(file.read_text())
    assert values["data"]["val"] == str(folder / "val") and values["model"]["encoder"]["levels"] == [1, 4]
    step = ["--data.samples_per_epoch", "2", "--data.batch_size", "2", "--data.val_samples", "2", "--run.epochs", "1"]
    assert main(["train", "--config", str(file), "--output", str(tmp_path / "run"), *step]) == 0
    assert (tmp_path / "run" / "best" / "model.safetensors").is_file()
    assert main(["init", str(folder), "--output", str(file)]) == 1
    assert "exists already" in capfd.readouterr().err
    assert main(["init", str(folder), "--output", str(tmp_path / "b.yaml"), "--hours", "0"]) == 1
    assert "--hours: expected a positive number" in capfd.readouterr().err


def test_slides_that_do_not_fit_are_refused(tmp_path):
    one = np.zeros((16, 16), np.uint8)
    write(tmp_path / "one", one, one)
    with pytest.raises(InputError, match="labels of at least two classes"):
        survey_folder(tmp_path / "one")
    write(tmp_path / "mixed", one, one)
    write(tmp_path / "mixed", np.zeros((16, 16, 3), np.uint8), one, "b")
    with pytest.raises(InputError, match=r"b\.png: expected 1 channels of uint8"):
        survey_folder(tmp_path / "mixed")


def test_slides_without_a_folder_to_validate_on_are_divided(folder, tmp_path):
    label = cells()
    for name in "abc":
        write(tmp_path / "all", label, label, name)
    survey = survey_folder(tmp_path / "all")
    common = {"train": tmp_path / "all", "encoder": None, "hours": 1.0}
    assert nested(propose(survey, 480, CPU, val=None, **common))["data"]["split"] == {"val": 0.2}
    data = nested(propose(survey, 480, CPU, val=folder / "val", **common))["data"]
    assert data["val"] == str(folder / "val") and "split" not in data
