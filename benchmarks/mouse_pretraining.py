"""What masked pre-training brings on the mouse-brain sections, as a table and as reconstruction errors.

    P="muvit pretrain --config recipes/mouse_sections_pretrain.yaml"
    $P --output runs/mouse_pretrain
    $P --boxes naive --output runs/mouse_pretrain_naive
    T="muvit train --config recipes/mouse_sections.yaml --data.val data/mouse_sections/test --run.epochs 8"
    $T --output runs/mouse_scratch
    $T --init.encoder runs/mouse_pretrain --optim.encoder_lr_factor 0.3 --output runs/mouse_fine_tuned
    python benchmarks/mouse_pretraining.py

Reconstruction errors are means over 256 crops of the held-out sections, under the same masks for both models: three
quarters of all patches, shared out between the levels by chance as in training, or three quarters of each level.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from markdown_table import markdown_table
from torch.utils.data import default_collate

from muvit.evaluation.studies.epochs import read_curves
from muvit.mae import MuViTMAE2d
from muvit.settings import read_settings
from muvit.training.datamodules import PretrainData
from muvit.training.recipes import PretrainRecipe

NUM_CROPS, BATCH, SEED = 256, 32, 0


def reconstruction_errors(run: Path, *, per_level: bool) -> dict[float, float]:
    """Mean squared error of the masked patches of each level on the crops that the run was validated on."""
    recipe = read_settings(run / "recipe.yaml", PretrainRecipe)
    recipe = replace(recipe, data=replace(recipe.data, val_samples=NUM_CROPS))
    crops = PretrainData(recipe).val_crops
    assert crops is not None
    model = MuViTMAE2d.from_folder(run / "last").eval()
    totals = torch.zeros(len(model.levels))
    generator = torch.Generator().manual_seed(SEED)
    for first in range(0, NUM_CROPS, BATCH):
        batch = default_collate([crops[i] for i in range(first, first + BATCH)])
        bbox = batch["bbox"] if recipe.boxes == "true" else None
        with torch.inference_mode():
            result = model(batch["img"], bbox, consistent_levels=per_level, rng_generator=generator)
        totals += result["loss_per_level"]
    return dict(zip(model.levels, (totals * BATCH / NUM_CROPS).tolist(), strict=True))


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    runs = parser.parse_args().runs
    names = {"from scratch": "mouse_scratch", "pre-trained": "mouse_fine_tuned"}
    curves = {name: read_curves(runs / folder, ["val_mdsc"])["val_mdsc"][1] for name, folder in names.items()}
    epochs = range(1, min(map(len, curves.values())) + 1)
    print("mDSC on the held-out sections after each epoch:\n")
    rows = [[name, *(f"{v:.3f}" for v in curve)] for name, curve in curves.items()]
    print(markdown_table(["start", *(f"E{e}" for e in epochs)], rows))
    folders = {"true": "mouse_pretrain", "naive": "mouse_pretrain_naive"}
    print("\nMean squared error of masked patches on held-out sections:\n")
    rows, head = [], []
    for masks, per_level in (("as in training", False), ("three quarters of each level", True)):
        for boxes, folder in folders.items():
            errors = reconstruction_errors(runs / folder, per_level=per_level)
            head = [f"level {level:g}" for level in errors]
            rows.append([masks, boxes, *(f"{error:.5f}" for error in errors.values())])
    print(markdown_table(["masks", "boxes", *head], rows))


if __name__ == "__main__":
    main()
