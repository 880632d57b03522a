"""Make the model of a finished run the one that the package ships: half precision, scored anew, with card and recipe.

    python benchmarks/ship_model.py demo/runs/muvit_1_8

replaces src/muvit/models/packaged/muvit-synthetic-small, by which `muvit demo` labels its first image. The score in its
card is that of the weights as shipped, on Synthetic images that no training uses; a test computes it again.
"""

import argparse
import copy
import re
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from muvit.cli.demo import FIRST_UNSEEN, MODEL, write_unseen
from muvit.data.slides.open import open_slide
from muvit.evaluation.scores.segmentation import Evaluation, evaluate_slides
from muvit.inference.predict import predict_slide
from muvit.inference.run.plan import AS_PUBLISHED
from muvit.models.card import read_card
from muvit.models.folder import PACKAGED, WEIGHTS, model_folder
from muvit.models.hub import CARD
from muvit.models.segmentation_model import SegmentationModel
from muvit.models.trained import TrainedModel, load_model

NUM_IMAGES = 2
MAX_BYTES = 1_500_000


def score_unseen(trained: TrainedModel[SegmentationModel], scratch: Path) -> Evaluation:
    """Scores on images that no training uses, without overlap of the tiles."""
    pairs = []
    for image, truth in write_unseen(scratch, NUM_IMAGES):
        labels = scratch / "predictions" / image.name
        labels.parent.mkdir(exist_ok=True)
        predict_slide(trained, open_slide(image), labels, options=AS_PUBLISHED, device="cpu")
        pairs.append((open_slide(labels), open_slide(truth)))
    names = trained.preprocessing.class_names
    return evaluate_slides(pairs, len(names), class_names=names)


def ship(run: Path, target: Path) -> float:
    """Write the shipped model of a run; its mDSC."""
    folder = model_folder(run)
    trained = load_model(folder, kind=SegmentationModel)
    half = TrainedModel(model=copy.deepcopy(trained.model).half(), preprocessing=trained.preprocessing)
    half.save(target, overwrite=True)
    if (size := (target / WEIGHTS).stat().st_size) > MAX_BYTES:
        raise SystemExit(f"{target / WEIGHTS}: {size} bytes, more than {MAX_BYTES}")
    with TemporaryDirectory() as scratch:
        result = score_unseen(load_model(target, kind=SegmentationModel), Path(scratch))
    card, text = read_card(folder), (folder / CARD).read_text()
    recipe = re.search(r"## Recipe\n\n```yaml\n(.*?)```", text, re.DOTALL)
    images = f"{NUM_IMAGES} images, {FIRST_UNSEEN} to {FIRST_UNSEEN + NUM_IMAGES - 1}, that no training uses"
    shipped = replace(
        card,
        title=MODEL,
        license="bsd-3-clause",
        data={**card.data, "tested on": images},
        scores={"test_mdsc": result.pooled.mean_dice, **{f"test_dice/{n}": v for n, v in _dice(result)}},
        provenance={**card.provenance, "precision": "float16"},
        recipe=None if recipe is None else recipe[1],
    )
    (target / CARD).write_text(shipped.to_markdown())
    return result.pooled.mean_dice


def _dice(result: Evaluation) -> list[tuple[str, float]]:
    return list(zip(result.names(result.foreground), result.pooled.dice[result.foreground].tolist(), strict=True))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run, such as demo/runs/muvit_1_8")
    parser.add_argument("--output", type=Path, default=PACKAGED / MODEL)
    arguments = parser.parse_args()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    print(f"{arguments.output}: mDSC {ship(arguments.run, arguments.output):.4f}")
