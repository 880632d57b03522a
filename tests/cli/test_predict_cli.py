import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from muvit.cli import main
from muvit.data.crops.normalize import Range
from muvit.data.crops.preprocessing import Preprocessing
from muvit.data.pyramids.writer import PyramidWriter
from muvit.data.slides.ome_zarr import OmeZarrSlide
from muvit.data.slides.open import open_slide
from muvit.data.slides.slide import Slide
from muvit.inference.run.label_blocks import prediction_status
from muvit.inference.run.resume import read_plan
from muvit.models.encoder import EncoderConfig
from muvit.models.segmenter import Segmenter, SegmenterConfig


@pytest.fixture
def work(tmp_path):
    """A tiny model and two images."""
    torch.manual_seed(0)
    encoder = EncoderConfig(**{"in_channels": 1, "levels": (1, 4), "num_layers": 4, "dim": 16, "heads": 1})
    model = Segmenter(SegmenterConfig(encoder=encoder, num_classes=3, decoder_widths=(4, 4, 4, 4), stem_width=4))
    settings = Preprocessing(
        crop_size=(16, 16),
        normalization=Range(high=255),
        class_names=("background", "one", "two"),
        class_colors=((0, 0, 0), (255, 0, 0), (0, 255, 0)),
    )
    model.save(tmp_path / "model", extra_files={"preprocessing.yaml": settings.to_yaml()})
    for seed, name in enumerate("ab"):
        pixels = np.random.default_rng(seed).integers(0, 256, (1, 70, 90), dtype=np.uint8)
        writer = PyramidWriter.create(
            tmp_path / f"{name}.ome.zarr",
            shape=(70, 90),
            num_channels=1,
            dtype=np.uint8,
            levels=(1, 4),
            chunk=16,
            shard=32,
        )
        writer.write((0, 0), pixels)
        writer.finish()
    return tmp_path


def predict(work, *arguments, slides="a"):
    images = [f"{work}/{name}.ome.zarr" for name in slides]
    fixed = ["--output", f"{work}/out", "--device", "cpu", "--block_px", "32", "--overlap", "0"]
    return main(["predict", f"{work}/model", *images, *fixed, *map(str, arguments)])


def spoil(work, name):
    """Damage a shard that planning does not look into; returns how to mend it."""
    shard = work / f"{name}.ome.zarr" / "0" / "c" / "0" / "1" / "1"
    whole = shard.read_bytes()
    shard.write_bytes(bytes(40) + whole[40:])
    return lambda: shard.write_bytes(whole)


@pytest.fixture
def careless(monkeypatch):
    """No fingerprints: images are read for the first time by their tiles."""
    monkeypatch.setattr(Slide, "identify", lambda slide: {"path": str(slide.path)})


def test_status_is_told_without_the_model(work, capfd):
    refined = ("--overlap", "0.5", "--refine", "0.9")
    for part in ("1/2", "2/2"):
        (work / "model").rename(work / "hidden")
        assert predict(work, "--status") == 0
        (work / "hidden").rename(work / "model")
        assert predict(work, "--part", part, *refined) == 0
    assert predict(work, "--status") == 0
    out, err = (text.splitlines() for text in capfd.readouterr())
    assert out[0] == f"{work}/out/a.ome.zarr: not started"
    assert out[1] == f"{work}/out/a.ome.zarr"
    assert out[2].startswith(f"{work}/out/a.ome.zarr: unfinished, 5 of 9 blocks, 0 of ")
    start, tiles, seams = out[4].split("; ")
    assert start == f"{work}/out/a.ome.zarr: complete, 9 of 9 blocks, 5 of 5 coarser shards"
    assert re.fullmatch(r"\d+ of \d+ tiles were computed, as labels are certain where the others lie", tiles)
    assert seams.startswith("labels change ")
    assert {f"a.ome.zarr: {tiles}", f"a.ome.zarr: {seams}"} <= {*err}


@pytest.mark.usefixtures("careless")
def test_one_slide_that_fails_does_not_stop_the_others(work, capfd):
    mend = spoil(work, "a")
    assert predict(work, slides="ab") == 1
    out, err = capfd.readouterr()
    assert out.split() == [f"{work}/out/b.ome.zarr"]
    assert "c/0/1/1 is corrupt" in err
    assert f"The unfinished output {work}/out/a.ome.zarr is kept: run the same command again to resume." in err
    assert "slides: expected 2 labelled, got 1 that failed" in err
    before = (work / "out" / "b.ome.zarr" / "zarr.json").stat().st_mtime_ns
    mend()
    assert predict(work, slides="ab") == 0
    assert sorted(capfd.readouterr().out.split()) == [f"{work}/out/a.ome.zarr", f"{work}/out/b.ome.zarr"]
    assert (work / "out" / "b.ome.zarr" / "zarr.json").stat().st_mtime_ns == before


@pytest.mark.usefixtures("careless")
def test_another_plan_is_refused_until_told_to_begin_anew(work, capfd):
    mend = spoil(work, "a")
    assert predict(work) == 1
    done = prediction_status(work / "out" / "a.ome.zarr")
    assert (done.state, done.blocks > 0) == ("unfinished", True)
    mend()
    capfd.readouterr()
    assert predict(work, "--overlap", 4) == 1
    err = capfd.readouterr().err
    assert "options.overlap 0.0 then, 4.0 now" in err
    assert "--overwrite to start over" in err
    assert prediction_status(work / "out" / "a.ome.zarr") == done
    assert predict(work, "--overlap", 4, "--overwrite") == 0
    assert prediction_status(work / "out" / "a.ome.zarr").state == "complete"


def test_a_changed_model_is_refused(work, capfd):
    assert predict(work, "--part", "1/2") == 0
    model = Segmenter.from_folder(work / "model")
    with torch.no_grad():
        model.head.bias[0] += 1
    preprocessing = (work / "model" / "preprocessing.yaml").read_text()
    model.save(work / "model", overwrite=True, extra_files={"preprocessing.yaml": preprocessing})
    assert predict(work, "--part", "2/2") == 1
    assert "model.sha256" in capfd.readouterr().err


def test_a_complete_output_is_left_as_it_is(work, capfd):
    assert predict(work) == 0
    before = {path: path.stat().st_mtime_ns for path in (work / "out").rglob("*")}
    assert predict(work) == 0
    out, err = capfd.readouterr()
    assert out.splitlines()[-1].endswith("a.ome.zarr")
    assert "a.ome.zarr: complete already" in err
    assert predict(work, "--overlap", 4) == 1
    assert "a.ome.zarr: exists already" in capfd.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in (work / "out").rglob("*")} == before


def test_everything_that_is_written_is_replaced_together(work):
    more = ("--probabilities", "uint8", "--entropy", "true", "--tta", "--overlap", "0.25")
    assert predict(work, *more) == 0
    names = {path.name for path in (work / "out").iterdir()}
    assert names == {"a.ome.zarr", "a.probabilities.ome.zarr", "a.entropy.ome.zarr", "index.html"}
    assert predict(work, "--overwrite") == 0
    assert {path.name for path in (work / "out").iterdir()} == {"a.ome.zarr", "index.html"}


def test_the_plan_stays_with_the_labels_and_the_work_folder_goes(work):
    assert predict(work, "--region", "0,0,20,20", "--part", "1/2") == 0
    target = work / "out" / "a.ome.zarr"
    begun = read_plan(target)
    assert begun["tiling"]["runs"] == "0 2 4 2 22"
    assert predict(work, "--region", "0,0,20,20") == 0
    assert read_plan(target) is None
    assert not (target / ".muvit").exists()
    labels = open_slide(target)
    assert (labels.read(1, (32, 32), (38, 58)) == 0).all()


def test_a_region_counts_from_the_scanned_part_of_slides_without_all_levels_too(work, monkeypatch):
    pixels = open_slide(work / "a.ome.zarr").read(1, (0, 0), (70, 90))
    writer = PyramidWriter.create(work / "c.ome.zarr", shape=(70, 90), num_channels=1, dtype=np.uint8, levels=(1,))
    writer.write((0, 0), pixels)
    writer.finish()
    corners = [[0, 0], [20, 0], [20, 20], [0, 20], [0, 0]]
    (work / "region.geojson").write_text(json.dumps({"type": "Polygon", "coordinates": [corners]}))
    monkeypatch.setattr(OmeZarrSlide, "bounds", ((32, 48), (38, 42)), raising=False)
    assert predict(work, "--region", work / "region.geojson", "--part", "1/2", slides="c") == 0
    options = read_plan(work / "out" / "c.ome.zarr")["options"]
    assert options["region"] == "POLYGON ((48 32, 48 52, 68 52, 68 32, 48 32))"
    # tissue that was drawn, and a region in it
    (work / "drawn").mkdir()
    (work / "region.geojson").rename(work / "drawn" / "c.geojson")
    both = ("--tissue", work / "drawn", "--region", "40,40,60,60")
    shutil.rmtree(work / "out")
    assert predict(work, *both, "--part", "1/2", slides="c") == 0
    options = read_plan(work / "out" / "c.ome.zarr")["options"]
    assert (options["tissue"], options["region"]) == ("all", "POLYGON ((48 40, 48 52, 60 52, 60 40, 48 40))")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--part", "3/2"], "part: expected a part such as 3/8"),
        (["--part", "some"], "part: expected a part such as 3/8"),
        (["--region", "nowhere.geojson"], "nowhere.geojson: expected a GeoJSON file with polygons"),
        (["--tissue", "nowhere.geojson"], "nowhere.geojson: expected a GeoJSON file with polygons"),
        (["--tissue", "drak"], "tissue: expected all or auto or dark or bright or stained, got 'drak'"),
        (["--refine", "0.1"], "refine: expected tiles that blend, and an overlap that leaves a half"),
        (["--refine", "1.5"], "refine: expected a number >= 0 and <= 1, got 1.5"),
        (["--overlap", "16"], "overlap: expected from 0 px to less than the crop"),
        (["--dask_workers", "0"], "dask_workers: expected a whole number >= 1"),
        (["--device", "cpu,abacus"], "device: expected a device of this machine"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(work, capfd, arguments, message):
    assert predict(work, *arguments) == 1
    assert message in capfd.readouterr().err
    assert not (work / "out").exists()


@pytest.fixture
def folder(work):
    """The two images in a folder of their own, beside what is no image."""
    (work / "test" / "images").mkdir(parents=True)
    for name in "ab":
        (work / f"{name}.ome.zarr").rename(work / "test" / "images" / f"{name}.ome.zarr")
    (work / "test" / "images" / "notes.csv").write_text("of no interest")
    (work / "test" / "images" / ".hidden.png").write_text("of no interest")
    return work / "test"


def predict_folder(work, folder, *arguments):
    fixed = ["--output", f"{work}/out", "--device", "cpu", "--block_px", "32", "--overlap", "0"]
    return main(["predict", f"{work}/model", f"{folder}", *fixed, *map(str, arguments)])


@pytest.mark.parametrize("inner", ["", "images"])
def test_all_slides_of_a_folder_are_labelled_and_scored_and_exported(work, folder, inner, capfd):
    assert predict_folder(work, folder / inner) == 0
    out, err = capfd.readouterr()
    assert out.split() == [f"{work}/out/{name}.ome.zarr" for name in "ab"]
    assert "2 slides: 2 labelled, 0 complete already, 0 failed" in err
    assert main(["evaluate", f"{work}/out", f"{work}/out"]) == 0
    assert main(["export", f"{work}/out", "--image", f"{folder / inner}", "--output", f"{work}/export"]) == 0
    assert {file.name for file in (work / "export").iterdir()} >= {"a.geojson", "b.geojson", "areas.csv"}
    assert predict_folder(work, folder / inner) == 0
    assert "2 slides: 0 labelled, 2 complete already, 0 failed" in capfd.readouterr().err


@pytest.mark.usefixtures("careless")
def test_a_folder_is_gone_on_with_slide_by_slide(work, folder, capfd):
    mend = spoil(folder / "images", "a")
    assert predict_folder(work, folder) == 1
    out, err = capfd.readouterr()
    assert out.split() == [f"{work}/out/b.ome.zarr"]
    assert "2 slides: 1 labelled, 0 complete already, 1 failed" in err
    assert "slides: expected 2 labelled, got 1 that failed: a." in err
    mend()
    assert predict_folder(work, folder) == 0
    assert "2 slides: 1 labelled, 1 complete already, 0 failed" in capfd.readouterr().err


def test_slides_of_a_folder_that_do_not_fit_are_all_named_before_any_is_labelled(work, folder, capfd):
    for name, shape in (("c", (3, 40, 40)), ("d", (2, 40, 40))):
        writer = PyramidWriter.create(
            folder / "images" / f"{name}.ome.zarr", shape=shape[1:], num_channels=shape[0], dtype=np.uint8
        )
        writer.write((0, 0), np.zeros(shape, np.uint8))
        writer.finish()
    assert predict_folder(work, folder) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert all(f"channels of {folder}/images/{name}.ome.zarr" in err for name in "cd")
    assert "slides: expected 4 that can be labelled, got 2 that failed: c, d." in err
    assert not (work / "out").exists()


@pytest.mark.parametrize("inner", ["", "images"])
def test_labels_do_not_go_into_the_folder_of_their_slides(work, folder, inner, capfd):
    before = sorted(folder.rglob("*"))
    assert main(["predict", f"{work}/model", f"{folder}", "--output", f"{folder / inner}", "--device", "cpu"]) == 1
    assert "--output: expected another folder than that of the slides" in capfd.readouterr().err
    assert sorted(folder.rglob("*")) == before


def test_a_folder_with_slides_beside_its_images_is_ambiguous(work, folder, capfd):
    (folder / "images" / "a.ome.zarr").rename(folder / "a.ome.zarr")
    assert predict_folder(work, folder) == 1
    assert "expected images in the folder itself, or in its folder 'images', got both" in capfd.readouterr().err


@pytest.mark.parametrize("upwards", ["..", "link/.."])
def test_paths_that_lead_upwards_also_through_links(work, tmp_path, monkeypatch, capfd, upwards):
    """Behind a link, `..` is the folder above the one that it leads to."""
    (tmp_path / "far" / "inner").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "link").symlink_to(tmp_path / "far" / "inner")
    for name in ("model", "a.ome.zarr"):
        (tmp_path / "far" / name).symlink_to(tmp_path / name)
    home = tmp_path if upwards == ".." else tmp_path / "far"
    monkeypatch.chdir(tmp_path / "here")
    Image.fromarray(np.arange(2400, dtype=np.uint8).reshape(40, 60)).save(home / "b.png")
    calls = [
        ["convert", f"{upwards}/b.png", "--output", f"{upwards}/made"],
        ["convert", f"{upwards}/made/b.ome.zarr", "--output", f"{upwards}/again/b.ome.zarr"],
        ["predict", f"{upwards}/model", f"{upwards}/a.ome.zarr", f"{upwards}/made", "--output", f"{upwards}/out"],
        ["features", f"{upwards}/model", f"{upwards}/made/b.ome.zarr", "--output", f"{upwards}/b.zarr"],
        ["evaluate", f"{upwards}/out", f"{upwards}/out", "--output", f"{upwards}/scores.json"],
        ["export", f"{upwards}/out", "--output", f"{upwards}/export"],
    ]
    for call in calls:
        assert main(call) == 0, capfd.readouterr().err
    assert open_slide(f"{upwards}/again/b.ome.zarr").read(1, (0, 0), (40, 60)).tolist() == [
        np.arange(2400, dtype=np.uint8).reshape(40, 60).tolist()
    ]
    made = ("made/b.ome.zarr", "out/a.ome.zarr", "out/b.ome.zarr", "b.zarr", "scores.json", "export/areas.csv")
    assert all((home / name).exists() for name in made)
