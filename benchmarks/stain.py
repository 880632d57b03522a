"""Does a small model bear with other colours than it was trained in? Mouse-brain sections, half of them recoloured.

    python benchmarks/stain.py ../shared/data/mouse_brain_sections

Trains one small model for each setting on every other section, and scores it on the others: as they are, and in the
colours of two made-up laboratories (stains in other strengths and mixtures, another white balance). Writes the table to
``benchmarks/results/stain.md``, below what its head says of the run.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from markdown_table import markdown_table
from PIL import Image
from torch.utils.data import DataLoader

from muvit.data.crops.augment import Augmentation
from muvit.data.crops.crops import GridCrops
from muvit.data.crops.stain import from_density, hed_map, to_density
from muvit.data.crops.stored import collate, finish
from muvit.data.folders import open_labelled_folder
from muvit.labels import IGNORE
from muvit.losses import SegmentationLoss
from muvit.metrics import confusion_matrix, scores
from muvit.models.encoder import EncoderConfig
from muvit.models.segmenter import Segmenter, SegmenterConfig
from muvit.training.datamodules import SegmentationData
from muvit.training.recipes import DataConfig, Recipe

LEVELS, CROP, STEPS, BATCH, CLASSES, IGNORED = (4, 16), 64, 240, 16, 14, 14
GEOMETRY: dict[str, Any] = {"flip_axes": (-1,), "box_shift_px": 4.0}
RANGE = {"kind": "range", "low": 0, "high": 255}
JITTER = {"hed": 0.2, "brightness": 0.2, "contrast": 0.2, "saturation": 0.3, "hue": 0.05}
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "range": (RANGE, {}),
    "percentile (default)": ({"kind": "percentile"}, {}),
    "range, stain and colour jitter": (RANGE, JITTER),
    "percentile, stain and colour jitter": ({"kind": "percentile"}, JITTER),
    "percentile of the slide": ({"kind": "percentile", "scope": "slide"}, {}),
    "Reinhard": ({"kind": "reinhard"}, {}),
    "Macenko": ({"kind": "macenko"}, {}),
}
LABORATORIES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "as they are": lambda density: density,
    "paler and bluer": lambda density: (
        hed_map((1.2, 0.7, 0.6), (0.05, 0, 0))(density) + np.float32([[0.08], [0.04], [0]])
    ),
    "darker and redder": lambda density: (
        hed_map((1.0, 1.4, 1.3), (0, 0.05, 0))(density) + np.float32([[0], [0.05], [0.1]])
    ),
}


def write_sections(source: Path, folder: Path) -> None:
    """``train`` with every other section, and a folder with the others for each laboratory."""
    for number, image in enumerate(sorted((source / "images").glob("*.png"))):
        rgb = np.asarray(Image.open(image).convert("RGB")).transpose(2, 0, 1)
        for name in ("train",) if number % 2 == 0 else LABORATORIES:
            change = LABORATORIES["as they are" if name == "train" else name]
            density = change(to_density(rgb.reshape(3, -1), 255))
            pixels = np.rint(from_density(density, 255)).astype(np.uint8).reshape(rgb.shape)
            for kind in ("images", "labels"):
                (folder / name / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.transpose(1, 2, 0)).save(folder / name / "images" / image.name)
            (folder / name / "labels" / image.name).write_bytes((source / "labels" / image.name).read_bytes())


def train(folder: Path, normalization: dict[str, Any], jitter: dict[str, Any]) -> tuple[Segmenter, SegmentationData]:
    """A small model after some hundred steps on crops of the training sections."""
    torch.manual_seed(0)
    encoder = EncoderConfig(
        in_channels=3,
        levels=LEVELS,
        patch_size=8,
        dim=64,
        num_layers=3,
        heads=4,
        rotary_base=1000,
        level_embed_std=0.02,
    )
    config = SegmenterConfig(encoder=encoder, num_classes=CLASSES, decoder_widths=(32, 16, 8, 8), stem_width=8)
    data = DataConfig(
        train=str(folder / "train"),
        crop_size=CROP,
        padding="edge",
        normalization=normalization,
        augmentation=Augmentation(**GEOMETRY, **jitter),
        ignore_labels=(IGNORED,),
        samples_per_epoch=STEPS * BATCH,
        batch_size=BATCH,
        num_workers=0,
    )
    model = Segmenter(config)
    crops = SegmentationData(Recipe(data=data, model=config), model.views)
    loss = SegmentationLoss(dice_weight=0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=STEPS)
    model.train()
    for batch in map(finish, crops.train_dataloader()):
        optimizer.zero_grad()
        model.training_loss(batch, loss)[0].backward()
        optimizer.step()
        schedule.step()
    return model.eval(), crops


def score(model: Segmenter, data: SegmentationData, folder: Path) -> float:
    """mDSC on the sections of a folder."""
    slides = open_labelled_folder(folder, LEVELS, LEVELS[:1])
    total = np.zeros((CLASSES, CLASSES), np.int64)
    for batch in DataLoader(GridCrops(slides, data.crops), batch_size=32, collate_fn=collate):
        with torch.inference_mode():
            labels = model.label_logits(batch["img"], batch["bbox"]).argmax(dim=1)
        total += confusion_matrix(batch["label"].numpy(), labels.numpy(), CLASSES, (IGNORE,))
    return scores(total).mean_dice


def main() -> None:
    """Train, score, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", type=Path, help="folder with images/ and labels/ of the sections")
    parser.add_argument("--table", type=Path, default=Path(__file__).parent / "results" / "stain.md")
    parser.add_argument("--only", nargs="*", choices=list(SETTINGS), default=list(SETTINGS), help="settings to train")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_sections(arguments.sections, folder)
        for setting in arguments.only:
            normalization, jitter = SETTINGS[setting]
            begin = time.process_time()
            model, data = train(folder, normalization, jitter)
            seconds = time.process_time() - begin
            found = [score(model, data, folder / laboratory) for laboratory in LABORATORIES]
            rows.append([setting, *(f"{value:.3f}" for value in found), f"{seconds:.0f}"])
            print(rows[-1], flush=True)
    table = markdown_table(["normalisation, augmentation", *LABORATORIES, "training [s]"], rows)
    before = arguments.table.read_text().partition("| normalisation,")[0] if arguments.table.exists() else ""
    arguments.table.write_text(f"{before}{table}\n")


if __name__ == "__main__":
    main()
