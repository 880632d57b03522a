"""Slides, model folders and a run, as the code of one commit wrote them, and what later code makes of them."""

import csv
import shutil
from contextlib import chdir
from pathlib import Path
from tempfile import TemporaryDirectory

import builders
import numpy as np
import torch
import yaml
from cases import DATA, views
from record import digest, summaries

CLASSES = {0: "background", 1: "disc", 2: "ring"}
ENCODER = {"in_channels": 2, "levels": (1, 4), "patch_size": 4, "num_layers": 2, "dim": 16, "heads": 2}
SIZE = (16, 32)
MODELS = {
    "segmenter": lambda: builders.segmenter(ENCODER, num_classes=3, decoder_widths=(8, 8, 4), stem_width=4),
    "mae": lambda: builders.mae(2, **ENCODER | {"num_layers": 1, "dim_decoder": 16, "num_layers_decoder": 1}),
    "classifier": lambda: builders.classifier(ENCODER | {"num_layers": 1}, num_classes=3, pooling="attention"),
    "relay": lambda: builders.relay(
        backbone="vit_tiny_patch16_224",
        timm_options={"patch_size": 4, "depth": 1, "embed_dim": 16, "num_heads": 2},
        in_channels=2,
        num_classes=3,
        levels=(1, 4),
        size=SIZE,
    ),
    "baseline": lambda: builders.baseline(
        network="residual_unet", width=1, in_channels=2, num_classes=3, levels=(1, 4), views="stacked"
    ),
}
RECIPE = {
    "data": {
        "train": "slides/train",
        "val": "slides/val",
        "crop_size": 16,
        "samples_per_epoch": 6,
        "val_samples": 2,
        "batch_size": 2,
        "num_workers": 0,
        "balance": "classes",
    },
    "model": {
        "encoder": {"in_channels": 2, "levels": [1, 4], "patch_size": 4, "num_layers": 2, "dim": 8, "heads": 1},
        "num_classes": 3,
        "decoder_widths": [4, 4, 4],
        "stem_width": 4,
    },
    "optim": {"lr": 1e-3},
}


def pixels(height: int, width: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """An image (2, y, x) uint8 of a disc in a ring, textured, and its labels; integers all the way."""
    y, x = np.mgrid[:height, :width]
    radius = (y - height // 2 - seed) ** 2 + (x - width // 2 + 2 * seed) ** 2
    labels = np.where(radius < (height // 5) ** 2, 1, np.where(radius < (height // 3) ** 2, 2, 0))
    texture = (y * (3 + seed) + x * 5) // 4 % 16 + 4 * (y // 8 + x // 8) % 12
    return np.stack([40 + 60 * labels + texture, 200 - 50 * labels + texture // 2]).astype(np.uint8), labels[None]


def write_folders() -> None:
    """Everything under `DATA`, anew."""
    shutil.rmtree(DATA, ignore_errors=True)
    for split, name, height, width, seed in (
        ("train", "a", 96, 128, 0),
        ("train", "b", 80, 70, 3),
        ("val", "c", 64, 96, 5),
    ):
        image, label = pixels(height, width, seed)
        builders.write_slide(DATA / "slides" / split / "images" / f"{name}.ome.zarr", image)
        builders.write_slide(
            DATA / "slides" / split / "labels" / f"{name}.ome.zarr", label.astype(np.uint8), labels=CLASSES
        )
    for kind, build in MODELS.items():
        builders.save(build(), DATA / "models" / kind, crop_size=SIZE)
    with chdir(DATA):
        Path("recipe.yaml").write_text(yaml.safe_dump(RECIPE, sort_keys=False))
        builders.train(Path("recipe.yaml"), Path("run"), epochs=2)
        Path("recipe.yaml").unlink()
        shutil.rmtree("run/tensorboard")  # names the machine, as does the place of the checkpoint
        checkpoint = torch.load("run/resume/last.ckpt", weights_only=True)
        for state in checkpoint["callbacks"].values():
            state.update({k: "run/resume" for k, v in state.items() if isinstance(v, str) and v.startswith("/")})
        torch.save(checkpoint, "run/resume/last.ckpt")


def model_outputs(kind: str, folder: Path) -> dict:
    """What a model of a folder makes of fixed views."""
    model, (img, bbox) = builders.load(kind, folder), views(*SIZE)
    with torch.no_grad():
        if kind == "mae":
            order = torch.from_numpy(builders.uniform("mask", (2, 64))).argsort(dim=1)
            result = model(img, bbox, mask=builders.mask(order, 16))
            return summaries({"loss": result["loss"], "output": result["output"]})
        return summaries({"output": model(img, bbox)})


def prediction(scratch: Path) -> dict:
    """Labels of a slide, and what their store says of them."""
    output = scratch / "labels.ome.zarr"
    labels = builders.predict(DATA / "models" / "segmenter", DATA / "slides" / "val" / "images" / "c.ome.zarr", output)
    finest = labels.read(1, (0, 0), labels.shape)
    described = (output / "zarr.json").read_text()
    return {
        "labels": {"shape": list(finest.shape), "hash": digest(finest), "counts": np.bincount(finest.ravel()).tolist()},
        "pixel size": list(labels.pixel_size_um),
        "levels": [list(labels.level_shape(level)) for level in labels.levels],
        "described": {text: text in described for text in (*CLASSES.values(), "0.5", "multiscales", "image-label")},
    }


def resumed(scratch: Path) -> dict:
    """The run after one more epoch: what it logged, and what the model has become."""
    shutil.copytree(DATA, scratch / "copy")
    with chdir(scratch / "copy"):
        builders.train(Path("run/recipe.yaml"), Path("run"), epochs=3, resume=True)
        logs = sorted(Path("run/logs").glob("*/metrics.csv"))
        with logs[-1].open(newline="") as lines:
            rows = list(csv.DictReader(lines))
        losses = [float(row["train_loss"]) for row in rows if row.get("train_loss")]
        scores = [float(row["val_loss"]) for row in rows if row.get("val_loss")]
        steps = [int(row["step"]) for row in rows if row.get("val_loss")]
        logged = summaries({"train_loss": torch.tensor(losses), "val_loss": torch.tensor(scores)})
        return {"steps": steps, "logged": logged, "last": model_outputs("segmenter", Path("run/last"))}


def outputs() -> dict:
    """All of this, for the record."""
    with TemporaryDirectory() as scratch:
        models = {kind: model_outputs(kind, DATA / "models" / kind) for kind in MODELS}
        models["run"] = model_outputs("segmenter", DATA / "run")
        return {"models": models, "prediction": prediction(Path(scratch)), "resumed": resumed(Path(scratch))}
