"""Classification of whole images by frozen features: linear probe and kNN (MuViT section 4.4, table 7)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader

from muvit.data.crops.crops import NestedCrops
from muvit.data.crops.preprocessing import Preprocessing
from muvit.data.folders import open_folder
from muvit.data.slides.slide import Slide
from muvit.data.tables import values_of
from muvit.errors import InputError, require_package
from muvit.evaluation.charts import draw_bars, new_figure, to_image
from muvit.evaluation.results import Row
from muvit.inference.run.execution import resolve_device
from muvit.metrics import mean_known, one_vs_rest_auc
from muvit.models.classifier import mean_tokens
from muvit.models.encoder import MuViTEncoder
from muvit.models.hierarchy import RegionEncoder
from muvit.progress import Progress

FrozenEncoder = MuViTEncoder | RegionEncoder
"""Encoders whose features can be probed."""


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """Settings of the features and of their classification; the numbers of crops are the paper's."""

    train_crops: int = 5
    """Random nested crops of each training image."""
    test_crops: int = 10
    """Random nested crops of each test image."""
    pooling: Literal["mean", "levels"] = "mean"
    """Mean of all tokens, or the mean of each level, one after the other."""
    boxes: Literal["true", "naive"] = "true"
    """Positions that the encoder sees: the true boxes, or one set of centred boxes for all."""
    neighbors: int = 5
    """Neighbours of the kNN classifier."""
    seed: int = 0
    """Seed of the crops."""
    batch_size: int = 8
    """Crops computed at once."""

    def __post_init__(self) -> None:
        for name in ("train_crops", "test_crops", "neighbors", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(name, expected="a positive number", got=getattr(self, name))
        for name, allowed in (("pooling", ("mean", "levels")), ("boxes", ("true", "naive"))):
            if getattr(self, name) not in allowed:
                raise InputError(name, expected=" or ".join(allowed), got=repr(getattr(self, name)))


@dataclass(frozen=True, kw_only=True)
class ProbeScores:
    """Scores of one classifier on frozen features."""

    model: str
    """Name of the encoder."""
    classifier: Literal["logistic regression", "kNN"]
    """The classifier trained on the features."""
    unit: Literal["crop", "slide"]
    """Classified units: crops, or slides by the mean probabilities of their crops."""
    accuracy: float
    """Share of right answers."""
    auc: Mapping[str, float]
    """One-vs-all area under the ROC curve of each class; NaN if the test images are all or none of the class."""

    @property
    def mean_auc(self) -> float:
        """Mean over the classes (macro average)."""
        return mean_known(np.array(list(self.auc.values())))

    def row(self) -> Row:
        """Line of a table."""
        row: dict[str, str | float] = {"model": self.model, "classifier": self.classifier, "unit": self.unit}
        return (
            row | {"mean_auc": self.mean_auc, "accuracy": self.accuracy} | {f"auc/{k}": v for k, v in self.auc.items()}
        )


def study_probe(
    name: str,
    encoder: FrozenEncoder,
    preprocessing: Preprocessing,
    train: Path,
    test: Path,
    classes: Mapping[str, str],
    config: ProbeConfig | None = None,
    *,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
) -> list[ProbeScores]:
    """Classify images by the frozen features of random crops of them.

    Features are standardised; logistic regression and kNN are scikit-learn's.

    Args:
        name: what to call the encoder.
        encoder: the frozen encoder; it is moved to ``device`` and put into evaluation mode.
        preprocessing: how it saw crops in training.
        train: folder with ``images`` to learn from.
        test: folder with ``images`` to score on.
        classes: class of each image by its name.
        config: crops, pooling, neighbours.
        device: where to compute; by default CUDA if there is any, else the CPU.
        progress: called after each batch.

    Raises:
        InputError: scikit-learn is missing, an image has no class, a test image is of a class that no training image
            has, or slides and encoder do not fit each other.
        ReadError: a slide cannot be read.
    """
    check_sklearn()
    config = ProbeConfig() if config is None else config
    slides = [open_folder(Path(folder) / "images", encoder.levels, preprocessing.pixels) for folder in (train, test)]
    answers = [list(values_of(found, dict(classes), "classes").values()) for found in slides]
    known = sorted(set(answers[0]))
    strange = sorted(set(answers[1]) - set(known))
    if strange or len(known) < 2:
        raise InputError(
            f"classes of {train}",
            expected="at least two, and all those of the test images",
            got=", ".join(known) + (f", but not {strange[0]}" if strange else ""),
        )
    counts = (config.train_crops, config.test_crops)
    total, features = sum(len(found) * count for found, count in zip(slides, counts, strict=True)), []
    encoder.to(resolve_device(device)).eval()
    done = 0
    for part, (found, count) in enumerate(zip(slides, counts, strict=True)):
        batches = []
        for batch in _crops(list(found.values()), encoder, preprocessing, config, count, part):
            batches.append(_features(encoder, batch, config))
            done += len(batches[-1])
            if progress is not None:
                progress(done, total)
        features.append(np.concatenate(batches))
    targets = [np.repeat([known.index(a) for a in part], n) for part, n in zip(answers, counts, strict=True)]
    return _classify(name, known, features, targets, config)


def draw_probe(scores: Sequence[ProbeScores]) -> Image.Image:
    """Bars of the one-vs-all AUC of each class and their mean, of crops, for each encoder and classifier."""
    shown = [s for s in scores if s.unit == "crop"]
    names = [*shown[0].auc, "mean"]
    figure, axes = new_figure(7, max(3.0, 0.25 * len(names) * len(shown) + 1.5))
    series = {f"{s.model}, {s.classifier}": [*s.auc.values(), s.mean_auc] for s in shown}
    draw_bars(axes[0, 0], names, series, label="one-vs-all ROC-AUC of crops")
    axes[0, 0].set_xlim(0, 1)
    return to_image(figure)


def check_sklearn() -> None:
    """Refuse to go on without scikit-learn.

    Raises:
        InputError: it is not installed.
    """
    require_package("sklearn", "probe", package="scikit-learn", install="'muvit[probe]'")


def _crops(
    slides: Sequence[Slide],
    encoder: FrozenEncoder,
    preprocessing: Preprocessing,
    config: ProbeConfig,
    count: int,
    part: int,
) -> DataLoader[Any]:
    """Batches of random crops, ``count`` of each slide in turn."""
    crops = preprocessing.crops(encoder.levels)
    seeds = [np.random.SeedSequence((config.seed, part, i)).generate_state(1)[0] for i in range(len(slides))]
    drawn = [
        NestedCrops([(slide, None)], crops, samples_per_epoch=count, seed=int(seed))
        for slide, seed in zip(slides, seeds, strict=True)
    ]
    return DataLoader(ConcatDataset(drawn), batch_size=config.batch_size)


@torch.inference_mode()
def _features(encoder: FrozenEncoder, batch: Mapping[str, torch.Tensor], config: ProbeConfig) -> NDArray[np.float32]:
    """Pooled tokens of a batch, ``(B, D)`` or ``(B, L * D)``."""
    device = next(encoder.parameters()).device
    bbox = batch["bbox"].to(device) if config.boxes == "true" else None
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        tokens = encoder(batch["img"].to(device), bbox)[0]
    return mean_tokens(tokens.float(), len(encoder.levels), config.pooling).cpu().numpy()


def _classify(
    name: str,
    known: Sequence[str],
    features: Sequence[NDArray[np.float32]],
    targets: Sequence[NDArray[np.int64]],
    config: ProbeConfig,
) -> list[ProbeScores]:
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    neighbors = min(config.neighbors, len(features[0]))
    classifiers: dict[Literal["logistic regression", "kNN"], Any] = {
        "logistic regression": LogisticRegression(max_iter=5000),
        "kNN": KNeighborsClassifier(neighbors, metric="cosine"),
    }
    scores = []
    for title, classifier in classifiers.items():
        fitted = make_pipeline(StandardScaler(), classifier).fit(features[0], targets[0])
        crops = fitted.predict_proba(features[1])
        of_slides = crops.reshape(-1, config.test_crops, len(known)).mean(1)
        for unit, probabilities, truth in (
            ("crop", crops, targets[1]),
            ("slide", of_slides, targets[1][:: config.test_crops]),
        ):
            scores.append(
                ProbeScores(
                    model=name,
                    classifier=title,
                    unit=unit,  # type: ignore[arg-type]
                    accuracy=float((probabilities.argmax(1) == truth).mean()),
                    auc=dict(zip(known, one_vs_rest_auc(probabilities, truth).tolist(), strict=True)),
                )
            )
    return scores
