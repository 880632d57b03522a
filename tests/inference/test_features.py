import csv
import json
from concurrent.futures import Future
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from array_slide import ArraySlide

from muvit.data.crops.normalize import Percentile, Range
from muvit.data.crops.placement import Window, place_views
from muvit.data.crops.preprocessing import CropConfig, Preprocessing
from muvit.data.crops.slide_crops import read_views
from muvit.data.slides.derived import complete_slide
from muvit.data.slides.ome_zarr import OmeZarrSlide
from muvit.encoders import MuViTEncoder2d, MuViTEncoder3d
from muvit.errors import ExistsError, InputError
from muvit.inference.features import extract_features, plan_extraction
from muvit.inference.run import planning
from muvit.inference.run.cluster import _distribute, _save_model
from muvit.inference.run.execution import Execution
from muvit.inference.run.plan import FeaturePlan
from muvit.models.baselines import Baseline, BaselineConfig
from muvit.models.encoder import EncoderConfig, MuViTEncoder
from muvit.models.mae import MAEConfig, MuViTMAE
from muvit.models.trained import TrainedModel

CROP, PATCH, LEVELS, DIM = (16, 24), 4, (1, 2, 8), 16
SETTINGS = Preprocessing(crop_size=CROP, normalization=Range(high=255), class_names=(), class_colors=())


def encoder(mode="all", blocks=True, cls=MuViTEncoder2d, levels=LEVELS):
    torch.manual_seed(0)
    made = cls(
        in_channels=1, levels=levels, patch_size=PATCH, dim=DIM, num_layers=2, heads=1, rotary_base=100,
        attention_mode=mode,
    ).eval()  # fmt: skip
    if not blocks:  # a token is then nothing but its own patch
        for block in made.layers:
            torch.nn.init.zeros_(block.attn.out.weight)
            torch.nn.init.zeros_(block.ff[-1].weight)
            torch.nn.init.zeros_(block.ff[-1].bias)
    return made


@pytest.fixture
def slide():
    pixels = np.random.default_rng(0).integers(0, 256, (1, 75, 101), dtype=np.uint8)
    return ArraySlide(pixels, levels=LEVELS, name="image", pixel_size_um=(0.5, 0.25))


@pytest.fixture(autouse=True)
def _several_blocks(monkeypatch):
    """Chunks of 4 x 4 patches and shards of 8 x 8, whose edges the tiles do not divide."""
    monkeypatch.setattr(planning, "_CHUNK_BYTES", 16 * DIM * 4)
    monkeypatch.setattr(planning, "_SHARD_BYTES", 64 * DIM * 4)


def read(output, level):
    store = OmeZarrSlide(output / f"level_{level}")
    return store.read(1, (0,) * store.ndim, store.shape)


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("mode", ["all", "coarse_to_fine"])
def test_each_patch_of_the_slide_lies_at_its_place(tmp_path, slide, mode):
    model = encoder(mode, blocks=False)
    output = extract_features(model, slide, tmp_path / "f.zarr", SETTINGS, dtype="float32", batch_size=3)
    for index, level in enumerate(LEVELS):
        pixels = slide.pyramid[level][0].astype(np.float32) / 255
        rows, columns = (-(-n // PATCH) for n in pixels.shape)
        padded = np.zeros((rows * PATCH, columns * PATCH), np.float32)
        padded[: pixels.shape[0], : pixels.shape[1]] = pixels
        patches = padded.reshape(rows, PATCH, columns, PATCH).swapaxes(1, 2).reshape(rows, columns, -1)
        with torch.no_grad():
            expected = model.proj[index](torch.from_numpy(patches)) + model.level_embed[index]
        np.testing.assert_allclose(read(output, level), expected.permute(2, 0, 1), atol=1e-5)


@pytest.mark.parametrize("mode, placement", [("all", "nested"), ("coarse_to_fine", "grid")])
def test_patches_are_encoded_in_their_context(tmp_path, slide, mode, placement):
    model = encoder(mode)
    output = extract_features(model, slide, tmp_path / "f.zarr", SETTINGS, levels=(1,), dtype="float32")
    features = read(output, 1)
    shapes = [(76, 104), *(slide.level_shape(level) for level in LEVELS[1:])]  # whole patches
    config = CropConfig(levels=LEVELS, size=CROP, normalization=SETTINGS.normalization)
    for start in ((0, 0), (32, 24), (60, 80)):  # the last tiles of both axes move back
        sample = read_views(slide, place_views(placement, shapes, LEVELS, CROP, start=start).windows, config)
        with torch.no_grad():
            maps = model.compute_features(sample["img"][None], sample["bbox"][None])[0, 0]
        first = [a // PATCH for a in start]
        written = features[:, first[0] : first[0] + 4, first[1] : first[1] + 6]
        skipped = (first[0] + 4 == 19, first[1] + 6 == 26)  # what the tiles before have written already
        inside = (slice(None), slice(3 if skipped[0] else 0, None), slice(4 if skipped[1] else 0, None))
        np.testing.assert_allclose(written[inside], maps.numpy()[inside], atol=1e-5)


def test_a_trained_model_stands_for_its_encoder_and_preprocessing(tmp_path, slide):
    torch.manual_seed(0)
    config = EncoderConfig(in_channels=1, levels=LEVELS, patch_size=PATCH, dim=DIM, num_layers=2, heads=1)
    model = MuViTMAE(MAEConfig(encoder=config, dim_decoder=16))
    trained = TrainedModel(model=model, preprocessing=SETTINGS)
    output = extract_features(trained, slide, tmp_path / "f.zarr", levels=(8,))
    before = files(output)
    extract_features(model.encoder, slide, output, SETTINGS, levels=(8,))  # complete; another plan would be refused
    assert files(output) == before
    with pytest.raises(InputError, match="encoder: expected a model with a multi-resolution encoder, got a Baseline"):
        baseline = Baseline(BaselineConfig(kind="residual_unet", width=1, in_channels=1, num_classes=2, levels=(1,)))
        extract_features(replace(trained, model=baseline), slide, tmp_path / "g.zarr")


def test_a_coarse_level_is_encoded_with_the_finer_ones_in_its_middle(tmp_path, slide):
    model = encoder("all")
    features = read(extract_features(model, slide, tmp_path / "f.zarr", SETTINGS, levels=(2,), dtype="float32"), 2)
    config = CropConfig(levels=LEVELS, size=CROP, normalization=SETTINGS.normalization)
    coarser = place_views("nested", [(40, 52), slide.level_shape(8)], LEVELS[1:], CROP, start=(16, 24)).windows
    # centre of the tile: pixel (16 + 8, 24 + 12) of level 2, (48, 72) of level 1
    windows = (Window(1, (40, 60), CROP), *coarser)
    sample = read_views(slide, windows, config)
    with torch.no_grad():
        maps = model.compute_features(sample["img"][None], sample["bbox"][None])[0, 1]
    np.testing.assert_allclose(features[:, 4:8, 6:12], maps.numpy(), atol=1e-5)


def test_from_coarse_to_fine_no_finer_pixels_are_read(tmp_path, slide):
    extract_features(encoder("coarse_to_fine"), slide, tmp_path / "f.zarr", SETTINGS, levels=(2,))
    assert {level for level, size in slide.windows if size == CROP} == {2}  # level 8 is smaller than a crop
    assert any(level == 8 for level, _ in slide.windows)


def test_the_table_holds_the_mean_and_the_world_box_of_every_tile(tmp_path, slide):
    output = extract_features(encoder(), slide, tmp_path / "f.zarr", SETTINGS)
    with (output / "pooled.csv").open() as file:
        head, *rows = csv.reader(file)
    assert head == ["level", "y0", "x0", "y1", "x1", *(f"f{i}" for i in range(DIM))]
    finest = np.array([row for row in rows if row[0] == "1"], float)
    assert len(finest) == 5 * 5
    covered = np.zeros(slide.shape, int)
    for _, y0, x0, y1, x1, *means in finest:
        covered[int(y0) : int(y1), int(x0) : int(x1)] += 1
        part = read(output, 1)[:, int(y0) // 4 : -(-int(y1) // 4), int(x0) // 4 : -(-int(x1) // 4)]
        np.testing.assert_allclose(means, part.astype(float).mean((1, 2)), rtol=1e-5, atol=1e-6)
    assert (covered == 1).all()
    assert [row[1:5] for row in rows if row[0] == "8"] == [["0", "0", "75", "101"]]


def test_the_store_tells_where_its_patches_lie(tmp_path, slide):
    output = extract_features(encoder(), slide, tmp_path / "f.zarr", SETTINGS)
    store = OmeZarrSlide(output / "level_2")
    assert store.shape == (10, 13)
    assert store.pixel_size_um == (0.5 * 2 * PATCH, 0.25 * 2 * PATCH)
    assert store.num_channels == DIM
    assert store.dtype == np.float16


@pytest.mark.parametrize("mode", ["all", "coarse_to_fine"])
def test_a_run_that_was_killed_goes_on_to_the_same_bytes(tmp_path, slide, mode):
    whole = extract_features(encoder(mode), slide, tmp_path / "whole.zarr", SETTINGS)
    output, counts = tmp_path / "killed.zarr", []

    def kill(done, total):
        calls.append((done, total))
        if len(calls) == 2:  # one block is written, and one only computed
            raise KeyboardInterrupt

    for _ in range(3):
        calls = []
        with pytest.raises(KeyboardInterrupt):
            extract_features(encoder(mode), slide, output, SETTINGS, progress=kill)
        counts.append(calls[-1])
        assert not (output / "zarr.json").exists()
    assert [done for done, _ in counts] == sorted({done for done, _ in counts})  # each time a block further
    extract_features(encoder(mode), slide, output, SETTINGS, progress=lambda *c: counts.append(c))
    assert counts[-1][0] == counts[-1][1]
    assert files(output) == files(whole)


@pytest.mark.parametrize("mode", [pytest.param("all", marks=pytest.mark.long), "coarse_to_fine"])
def test_features_do_not_depend_on_devices_and_parts(tmp_path, slide, mode):
    def made(name, **options):
        execution = Execution(**{"device": "cpu"} | options)
        return files(extract_features(encoder(mode), slide, tmp_path / name, SETTINGS, execution=execution))

    whole = made("whole")
    assert made("devices", device="cpu,cpu") == whole
    for part in ("2/3", "1/3"):
        assert made("parts", part=part) != whole
    assert made("parts", part="3/3") == whole


def test_a_worker_of_a_cluster_makes_the_same_features(tmp_path, slide, monkeypatch):
    class Here:
        """A cluster whose only worker is this process."""

        def nthreads(self):
            return {"one": 1}

        def submit(self, function, *arguments, pure):
            future = Future()
            future.set_result(function(*arguments))
            future.status = "finished"
            return future

    monkeypatch.setattr("distributed.get_worker", lambda: SimpleNamespace(name=0))
    torch.manual_seed(0)
    model = MuViTEncoder(EncoderConfig(in_channels=1, levels=LEVELS, patch_size=PATCH, dim=DIM, num_layers=2, heads=1))
    whole = extract_features(model, slide, tmp_path / "whole", SETTINGS)
    job = plan_extraction(model, slide, tmp_path / "cluster", SETTINGS)
    execution = Execution(backend="dask", device="cpu")
    job.store.begin()
    _save_model(job)
    with job.store.ledger() as ledger:
        blocks = job.store.missing_blocks()
        _distribute(Here(), job, blocks, execution, ledger, lambda _: None, workerless_s=1)
        job.store.finish(ledger)
    assert files(tmp_path / "cluster") == files(whole)


def test_a_plan_of_features_comes_back_from_json(tmp_path, slide):
    plan = plan_extraction(encoder(), slide, tmp_path / "f.zarr", SETTINGS, levels=(2, 8)).store.plan
    assert FeaturePlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    assert [plan.locate(block)[0] for block in range(plan.num_blocks)] == sorted(
        index for index, tiling in enumerate(plan.tilings) for _ in range(tiling.num_blocks)
    )
    with pytest.raises(IndexError):
        plan.locate(plan.num_blocks)


def test_a_run_of_another_plan_is_refused(tmp_path, slide):
    def kill(done, total):
        raise KeyboardInterrupt

    output = tmp_path / "f.zarr"
    with pytest.raises(KeyboardInterrupt):
        extract_features(encoder(), slide, output, SETTINGS, progress=kill)
    before = files(output)
    with pytest.raises(InputError, match=r"another: model\.sha256 .* then, .* now"):
        extract_features(encoder("causal"), slide, output, SETTINGS)
    assert files(output) == before
    extract_features(encoder("causal"), slide, output, SETTINGS, overwrite=True)
    before = files(output)
    with pytest.raises(ExistsError):
        extract_features(encoder(), slide, output, SETTINGS)
    extract_features(encoder("causal"), slide, output, SETTINGS)  # there is nothing to do
    assert files(output) == before


def test_the_batch_does_not_matter(tmp_path, slide):
    one, many = (
        extract_features(
            encoder("coarse_to_fine"), slide, tmp_path / f"{n}.zarr", SETTINGS, batch_size=n, dtype="float32"
        )
        for n in (1, 16)
    )
    for level in LEVELS:
        np.testing.assert_allclose(read(one, level), read(many, level), atol=1e-5)


def test_percentiles_over_all_views_share_no_contexts(tmp_path, slide):
    settings = Preprocessing(crop_size=CROP, normalization=Percentile(scope="sample"), class_names=(), class_colors=())
    features = read(
        extract_features(encoder("coarse_to_fine"), slide, tmp_path / "f.zarr", settings, dtype="float32"), 1
    )
    shapes = [(76, 104), *(slide.level_shape(level) for level in LEVELS[1:])]
    config = CropConfig(levels=LEVELS, size=CROP, normalization=settings.normalization)
    sample = read_views(slide, place_views("nested", shapes, LEVELS, CROP, start=(0, 0)).windows, config)
    with torch.no_grad():
        maps = encoder("coarse_to_fine").compute_features(sample["img"][None], sample["bbox"][None])[0, 0]
    np.testing.assert_allclose(features[:, :4, :6], maps.numpy(), atol=1e-5)


def test_volumes_have_features_too(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (1, 9, 20, 20), dtype=np.uint8)
    slide = ArraySlide(pixels, levels=(1, 2), name="volume")
    settings = Preprocessing(crop_size=(8, 8, 8), normalization=Range(high=255), class_names=(), class_colors=())
    model = encoder("coarse_to_fine", cls=MuViTEncoder3d, levels=(1, 2))
    output = extract_features(model, slide, tmp_path / "f.zarr", settings)
    assert read(output, 1).shape == (DIM, 3, 5, 5)
    assert read(output, 2).shape == (DIM, 2, 3, 3)
    assert np.isfinite(read(output, 1)).all()
    assert (read(output, 1) != 0).any(axis=0).all()


def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path, slide):
    output = tmp_path / "f.zarr"
    with pytest.raises(InputError, match=r"levels: expected levels out of \(1, 2, 8\), got \(4,\)"):
        extract_features(encoder(), slide, output, SETTINGS, levels=(4,))
    with pytest.raises(InputError, match="dtype: expected float16 or float32, got 'int8'"):
        extract_features(encoder(), slide, output, SETTINGS, dtype="int8")
    with pytest.raises(InputError, match="batch_size: expected a whole number >= 1"):
        extract_features(encoder(), slide, output, SETTINGS, batch_size=0)
    with pytest.raises(InputError, match="channels of image: expected 1, as the model has, got 2"):
        extract_features(
            encoder(), ArraySlide(np.zeros((2, 75, 101), np.uint8), levels=LEVELS, name="image"), output, SETTINGS
        )
    broken = encoder()
    with torch.no_grad():
        broken.proj[0][0].weight[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"weights of the model, proj\.0\.0\.weight"):
        extract_features(broken, slide, output, SETTINGS)
    assert not output.exists()


def test_numbers_too_large_for_the_store_are_refused(tmp_path, slide):
    huge = encoder(blocks=False)
    with torch.no_grad():
        huge.level_embed[1] += 1e5
    with pytest.raises(InputError, match=r"features in level_2 at \(0, 0\): expected finite numbers of float16"):
        extract_features(huge, slide, tmp_path / "f.zarr", SETTINGS)
    output = extract_features(huge, slide, tmp_path / "g.zarr", SETTINGS, dtype="float32")
    assert read(output, 2).min() > 9e4


def test_levels_that_a_slide_lacks_are_computed(tmp_path, slide, caplog):
    flat = ArraySlide(slide.read(1, (0, 0), slide.shape), levels=(1,), name="image", pixel_size_um=(0.5, 0.25))
    full = complete_slide(flat, LEVELS)
    caplog.clear()
    for name, given in (("flat", flat), ("full", full)):
        extract_features(encoder(), given, tmp_path / name, SETTINGS)
    assert files(tmp_path / "flat") == files(tmp_path / "full")
    assert len([message for message in caplog.messages if "would store them" in message]) == 1
