"""The recorded cases: by name, functions that return tensors of one model or data set, for fixed weights and inputs."""

import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import builders
import torch
from torch import Tensor, nn

DATA = Path(__file__).parent / "data" / "bb0f812"
"""Slides, model folders and a run, written by the code of that commit."""

_COPY = TemporaryDirectory()

Results = Mapping[str, Tensor]

ENCODER = {"in_channels": 2, "levels": (1, 4), "patch_size": 4, "num_layers": 4, "dim": 32, "heads": 2}
SEGMENTER = {"num_classes": 3, "decoder_widths": (16, 8, 8), "stem_width": 4}
QUERIES = {"decoder": "mask2former", "num_queries": 4, "query_layers": 2, "query_heads": 2}
VIT = {"backbone": "vit_tiny_patch16_224", "timm_options": {"depth": 2, "embed_dim": 32, "num_heads": 2}}
DEEP = VIT | {"timm_options": VIT["timm_options"] | {"depth": 4}}
SWIN = {
    "backbone": "swinv2_tiny_window8_256",
    "drop_path": 0.0,
    "timm_options": {"depths": (2, 2), "embed_dim": 16, "num_heads": (2, 4), "window_size": 4},
}


def views(*space: int, levels: tuple = (1, 4), channels: int = 2, batch: int = 2) -> tuple[Tensor, Tensor]:
    """Images (B, L, C, *space), and true boxes far from the origin, each view at another place of the next."""
    img = builders.tensor("img", batch, len(levels), channels, *space)
    size = torch.tensor(space, dtype=torch.float32)
    boxes = []
    for i, level in enumerate(levels):
        factor = torch.as_tensor(level, dtype=torch.float32)
        lower = 1000 + torch.arange(batch)[:, None] * 7 - i * torch.arange(1, len(space) + 1) * factor
        boxes.append(torch.stack([lower, lower + size * factor], dim=1))
    return img, torch.stack(boxes, dim=1)


def labels(*shape: int) -> Tensor:
    """Classes 0, 1, 2, and -100 (ignored) at every eleventh pixel."""
    index = torch.arange(torch.Size(shape).numel()).reshape(shape)
    return torch.where(index % 11 == 0, -100, (index // 5 + index // 37) % 3)


def batch(img: Tensor, bbox: Tensor) -> dict[str, Tensor]:
    found, levels_found = len(img), img.shape[1]
    every = labels(found, levels_found, *img.shape[3:])
    return {"img": img, "bbox": bbox, "label": every[:, 0], "labels": every}


def gradient_norm(model: nn.Module, loss: Tensor) -> Tensor:
    loss.backward()
    return torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()


# models


def encoded(ndim: int, space: tuple, levels: tuple = (1, 4), **settings: object) -> Results:
    model = builders.encoder(ndim, **ENCODER | {"levels": levels} | settings).eval()
    tokens, coords, level, kept = model(*views(*space, levels=levels), return_intermediate_idxs=(0, 2))
    without_boxes = model(views(*space, levels=levels)[0])
    return {"tokens": tokens, "coords": coords, "level": level, "kept": kept[0], "naive": without_boxes[0]}


def masked(ndim: int, space: tuple, **settings: object) -> Results:
    model = builders.mae(ndim, **ENCODER | {"num_layers": 2, "dim_decoder": 16} | settings).train()
    img, bbox = views(*space)
    count = 2 * torch.Size([n // 4 for n in space]).numel()
    order = torch.from_numpy(builders.uniform("mask", (2, count))).argsort(dim=1)
    result = model(img, bbox, mask=builders.mask(order, count // 4))
    norm = gradient_norm(model, result["loss"])
    return {"loss": result["loss"], "levels": result["loss_per_level"], "output": result["output"], "gradient": norm}


def segmented(model: nn.Module, *space: int, levels: tuple = (1, 4), channels: int = 2) -> Results:
    """Logits; then loss and gradient of training, and what it makes of the running statistics."""
    img, bbox = views(*space, levels=levels, channels=channels)
    with torch.no_grad():
        logits = model.eval().label_logits(img, bbox)
    loss, trained = model.train().training_loss(batch(img, bbox), builders.loss(class_weights=(1.0, 2.0, 1.0)))
    return {"logits": logits, "loss": loss, "trained": trained, "gradient": gradient_norm(model, loss)}


def segmenter(*space: int, encoder: Mapping = {}, levels: tuple = (1, 4), **settings: object) -> Results:
    sizes = ENCODER | {"levels": levels, "ndim": len(space)} | encoder
    return segmented(builders.segmenter(sizes, **SEGMENTER | settings), *space, levels=levels)


def relay(levels: tuple = (1, 4), **settings: object) -> Results:
    fixed = {"in_channels": 2, "num_classes": 3, "levels": levels, "size": (64, 64)}
    return segmented(builders.relay(**fixed | settings), 64, 64, levels=levels)


def baseline(**settings: object) -> Results:
    model = builders.baseline(in_channels=2, num_classes=3, width=2, **settings)
    return segmented(model, 32, 32, levels=settings["levels"])


def classified(**settings: object) -> Results:
    model = builders.classifier(ENCODER, num_classes=3, **settings)
    img, bbox = views(16, 24)
    loss = nn.functional.cross_entropy(model.train()(img, bbox), torch.tensor([0, 2]))
    norm = gradient_norm(model, loss)
    return {"logits": model.eval()(img, bbox), "features": model.features(img, bbox), "loss": loss, "gradient": norm}


def cached(**settings: object) -> Results:
    """Logits of tiles that share coarse views: the same with and without the cache."""
    levels = (1, 4, 16)
    encoder = ENCODER | {"levels": levels, "attention_mode": "coarse_to_fine"}
    model = builders.segmenter(encoder, **SEGMENTER | settings).eval()
    img, bbox = views(16, 16, levels=levels, batch=3)
    img[1:, 1:], bbox[1:, 1:] = img[:1, 1:], bbox[:1, 1:]
    shared = [(4, (4, 8), (16, 16)), (16, (0, 0), (16, 16))]
    windows = [[(1, (16 + i, 32), (16, 16)), *shared] for i in range(3)]
    with torch.no_grad():
        logits = builders.cached_logits(model, img, bbox, windows)
        torch.testing.assert_close(logits, model.label_logits(img, bbox), rtol=0, atol=2e-5)
    return {"logits": logits}


def losses() -> Results:
    logits, target = builders.tensor("logits", 2, 3, 8, 9), labels(2, 8, 9)
    weighted = builders.loss(ce_weight=0.5, dice_weight=0.3, class_weights=(1.0, 2.0, 0.5))
    ignored = torch.full_like(target, -100)
    return {
        "plain": builders.loss()(logits, target),
        "weighted": weighted(logits, target),
        "unlabelled": weighted(logits, ignored),
    }


# data sets


def slides(*, labelled: bool = True) -> list:
    folder = Path(_COPY.name) / "slides" / "train"
    if not folder.exists():  # a copy, since data sets keep what they found out beside the labels
        shutil.copytree(DATA / "slides" / "train", folder)
    return [
        (builders.slide(path), builders.slide(folder / "labels" / path.name) if labelled else None)
        for path in sorted((folder / "images").iterdir())
    ]


def samples(kind: str, *, labelled: bool = True, **options: object) -> Results:
    """The first batch of a data set."""
    crops = builders.crops(kind, slides(labelled=labelled), **options)
    return torch.utils.data.default_collate([crops[i] for i in range(4)])


TURNS = {"quarter_turns": True, "scale": (0.5, 2.0), "rotation_degrees": 90.0}
RANGE = {"kind": "range", "low": 0, "high": 255}

CASES: dict[str, Callable[[], Results]] = {
    "encoder 2d": partial(encoded, 2, (16, 24)),
    "encoder 3d": partial(encoded, 3, (8, 8, 12), levels=((1, 1, 1), (1, 4, 4))),
    "encoder 4d": partial(encoded, 4, (4, 4, 8, 8), num_layers=3),
    "encoder coarse_to_fine": partial(encoded, 2, (16, 24), attention_mode="coarse_to_fine"),
    "encoder causal, shared": partial(encoded, 2, (16, 24), attention_mode="causal", rotary_mode="shared"),
    "encoder same, base": partial(encoded, 2, (16, 24), attention_mode="same", rotary_param="base"),
    "encoder fixed, corners": partial(encoded, 2, (16, 24), rotary_mode="fixed", patch_spacing="corner"),
    "mae 2d": partial(masked, 2, (16, 24)),
    "mae 3d": partial(masked, 3, (8, 8, 8), loss="norm_mse"),
    "mae 4d": partial(masked, 4, (4, 4, 8, 8)),
    "mae multi_iso": partial(masked, 2, (16, 24), decoder_mode="multi_iso", attention_mode="coarse_to_fine"),
    "mae single": partial(masked, 2, (16, 24), decoder_mode="single"),
    "mae of release 0.1.0": partial(
        masked, 2, (16, 24), patch_spacing="corner", decoder_context="all", loss_average="token"
    ),
    "unetr 2d": partial(segmenter, 16, 24),
    "unetr 3d": partial(segmenter, 8, 8, 12, levels=(1, 4)),
    "unetr slim": partial(segmenter, 16, 24, decoder_widths="slim", stem_width=None),
    "unetr of all levels": partial(segmenter, 16, 24, decode="all"),
    "unetr, naive boxes": partial(segmenter, 16, 24, boxes="naive", encoder={"attention_mode": "coarse_to_fine"}),
    "mask2former": partial(segmenter, 16, 24, **QUERIES),
    "mask2former of all levels": partial(segmenter, 16, 24, decode="all", mask_key_rope=False, **QUERIES),
    "relay vit": partial(relay, **VIT),
    "relay vit, mean": partial(relay, update="mean", share_patch_embed=True, levels=(1, 2, 8), **VIT),
    "relay vit, decision": partial(relay, fusion="decision", **VIT),
    "relay vit, unetr, full": partial(
        relay, decoder="unetr", decoder_widths=(8, 8, 8, 8, 4), context_target="full", **DEEP
    ),
    "relay swin": partial(relay, **SWIN),
    "relay swin, mask2former": partial(
        relay, decoder="mask2former", decoder_widths=(32, 8, 8, 4), num_queries=4, **SWIN
    ),
    "baseline": partial(baseline, network="residual_unet", levels=(1,)),
    "baseline, stacked": partial(baseline, network="residual_unet", levels=(1, 4), views="stacked"),
    "classifier": classified,
    "classifier by levels": partial(classified, pooling="levels"),
    "classifier by attention": partial(classified, pooling="attention"),
    "context, unetr": cached,
    "context, mask2former": partial(cached, **QUERIES),
    "context, naive boxes": partial(cached, boxes="naive"),
    "losses": losses,
    "nested crops": partial(samples, "random", normalization=RANGE),
    "nested crops, balanced": partial(samples, "random", balance="classes", foreground_fraction=1.0, augmentation={}),
    "nested crops, all labels": partial(samples, "random", all_labels=True),
    "pretrain crops": partial(samples, "random", labelled=False, augmentation={}),
    "free views": partial(samples, "random", place="free"),
    "concentric": partial(samples, "random", place="concentric", size=(24, 24), augmentation=TURNS),
    "tiles": partial(samples, "grid", all_labels=True),
    "tiles, free": partial(samples, "grid", place="free"),
    "tiles, concentric": partial(samples, "grid", place="concentric"),
    "classified crops": partial(samples, "classified crops", labelled=False, classes=(0, 1), choice="classes"),
    "classified tiles": partial(samples, "classified tiles", labelled=False, classes=(0, 1)),
}
