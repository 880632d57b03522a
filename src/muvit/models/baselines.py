"""Networks of other libraries behind the interface of our segmenters: same samples, same loss, same budget.

A baseline sees the finest view alone, as published networks do, or all nested views stacked as channels of one image:
the control that has the context's pixels, but neither tokens nor coordinates to place them by.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Annotated, Any, Literal

from torch import Tensor, nn

from muvit.checks import Bounds, PositiveInt, check_fields, freeze_lists
from muvit.errors import InputError, ShapeError, require_package
from muvit.levels import Level, check_levels, plain_level
from muvit.models.segmentation_model import Criterion, SegmentationModel, Views
from muvit.models.swin_mask2former import SIZES, SwinMask2Former

NetworkName = Literal[
    "unet",
    "deeplabv3",
    "deeplabv3plus",
    "upernet",
    "fpn",
    "segformer",
    "mask2former",
    "residual_unet",
    "swinunetr",
    "unetr",
]


@dataclass(frozen=True)
class _Network:
    """Requirements of the library of a network."""

    packages: tuple[str, ...]
    multiple: int
    encoder_name: str = "none"
    width: int = 0


_SMP, _MONAI, _HF = ("segmentation_models_pytorch",), ("monai",), ("transformers",)
_NETWORKS = {
    "unet": _Network(_SMP, multiple=32, encoder_name="resnet34"),
    "deeplabv3": _Network(_SMP, multiple=8, encoder_name="resnet50"),
    "deeplabv3plus": _Network(_SMP, multiple=16, encoder_name="resnet50"),
    "upernet": _Network(_SMP, multiple=32, encoder_name="tu-convnext_base"),
    "fpn": _Network(_SMP, multiple=32, encoder_name="tu-pvt_v2_b1"),
    "segformer": _Network(_SMP, multiple=32, encoder_name="mit_b2"),
    "mask2former": _Network(_HF, multiple=32, width=256, encoder_name="swin_base"),
    "residual_unet": _Network(_MONAI, multiple=16, width=16),
    "swinunetr": _Network((*_MONAI, "einops"), multiple=32, width=24),
    "unetr": _Network((*_MONAI, "einops"), multiple=16, width=16, encoder_name="vit_base"),
}
_VIT = {"vit_tiny": (192, 3), "vit_small": (384, 6), "vit_base": (768, 12)}
"""Token width and attention heads of UNETR's transformers; all have 12 blocks."""
_TIMM = "tu-"
"""Prefix by which segmentation-models-pytorch calls an encoder of timm."""
_POOLED, _REDUCED = ("deeplabv3", "deeplabv3plus", "upernet"), ("unet", "fpn")
"""Networks that normalise one value of each sample, and one of each cell of 32 px, over the batch."""


@dataclass(frozen=True, kw_only=True)
class BaselineConfig:
    """A network of another library, and the task that it is built for."""

    kind: NetworkName
    """From segmentation-models-pytorch (2D): unet, deeplabv3, deeplabv3plus, upernet, fpn, segformer; from Hugging Face
    transformers (2D): mask2former, which learns by the matching loss of its paper in place of the recipe's loss; from
    MONAI (2D and 3D): residual_unet, swinunetr (version 2), unetr."""
    encoder_name: str | None = None
    """Encoder of segmentation-models-pytorch, or of timm after tu-, such as tu-pvt_v2_b2; unset, resnet34 for unet,
    resnet50 for deeplabv3 and deeplabv3plus, tu-convnext_base for upernet, tu-pvt_v2_b1 for fpn, mit_b2 for segformer.
    unetr takes vit_base (unset), vit_small and vit_tiny; mask2former swin_base (unset), swin_large, swin_small,
    swin_tiny and swin_nano (48 channels, 8 blocks: for a CPU)."""
    encoder_weights: str | None = None
    """Published weights that the encoder starts from, such as imagenet; timm, for an encoder of timm. They are fetched
    once, for a new model, never for one that is loaded from its folder. For mask2former, the folder of a whole model
    of transformers, or its name on huggingface.co, such as facebook/mask2former-swin-base-IN21k-ade-semantic."""
    width: PositiveInt | None = None
    """Channels of MONAI's finest stage; unset, 24 for swinunetr (a multiple of 12), 16 for the others. Of mask2former,
    channels of its decoder, a multiple of 32; unset, 256."""
    in_channels: PositiveInt | None = None
    """Channels of every view; unset in a recipe, those of the slides."""
    num_classes: Annotated[int, Bounds(min=2)] | None = None
    """Classes, background (class 0) included; unset in a recipe, those of the labels."""
    levels: tuple[Level, ...] = (1,)
    """Downsampling factor of each view, finest first; several views are stacked as channels of one image (early
    fusion)."""
    size: tuple[PositiveInt, ...] | None = None
    """Side of a view in pixels along each axis, for which unetr and encoders of timm with windows, such as Swin, are
    built (the others take any); unset in a recipe, data.crop_size."""
    ndim: Annotated[int, Bounds(min=2, max=3)] = 2
    """Spatial axes: 2 (yx) or 3 (zyx)."""

    def __post_init__(self) -> None:
        freeze_lists(self)
        check_fields(self)
        object.__setattr__(self, "levels", tuple(map(plain_level, self.levels)))
        check_levels(self.levels, self.ndim)
        self._check_network()

    def _check_network(self) -> None:
        network, packages = self.kind, _NETWORKS[self.kind].packages
        if packages in (_SMP, _HF) and self.ndim != 2:
            raise InputError(
                "kind",
                expected="residual_unet, swinunetr or unetr for volumes",
                got=f"{network}, which takes 2D images only",
            )
        refused = {
            "encoder_weights": packages not in (_SMP, _HF),
            "width": packages == _SMP,
            "encoder_name": network in ("residual_unet", "swinunetr"),
        }
        for name, is_refused in refused.items():
            if is_refused and getattr(self, name) is not None:
                raise InputError(name, expected=f"none, as {network} has no such choice", got=getattr(self, name))
        encoders = {"unetr": tuple(_VIT), "mask2former": tuple(SIZES)}
        if network in encoders and self.encoder_name not in (None, *encoders[network]):
            raise InputError("encoder_name", expected=" or ".join(encoders[network]), got=repr(self.encoder_name))
        multiple = {"swinunetr": 12, "mask2former": 32}.get(network, 1)
        if self.width is not None and self.width % multiple:
            raise InputError("width", expected=f"a multiple of {multiple} for {network}", got=self.width)


class Baseline(SegmentationModel):
    """A network of segmentation-models-pytorch, transformers or MONAI that labels the pixels of the finest view.

    Batch normalisation cannot learn from a single value: while training, deeplabv3, deeplabv3plus and upernet want
    batches of at least 2, and unet and fpn at least 2 of their 32-px cells in a batch.

    Args:
        config: the network; channels and classes (for unetr also the size) must be known.

    Raises:
        InputError: a setting does not fit, or the library is not installed.
    """

    config: BaselineConfig

    def __init__(self, config: BaselineConfig) -> None:
        super().__init__(config)
        for name in ("in_channels", "num_classes", *(("size",) if self._has_fixed_size else ())):
            if getattr(config, name) is None:
                raise InputError(name, expected=f"a value, to build {config.kind}", got="none")
        if config.size is not None:
            self.views.check_size(config.size, "size")
        self.network = _build(config, self.views.in_channels * len(config.levels))

    @property
    def views(self) -> Views:
        """The views that the model takes."""
        config = self.config
        assert config.in_channels is not None
        return Views(
            levels=config.levels,
            in_channels=config.in_channels,
            ndim=config.ndim,
            multiple=(_NETWORKS[config.kind].multiple,) * config.ndim,
            size=config.size if self._has_fixed_size else None,
        )

    @property
    def _has_fixed_size(self) -> bool:
        """Whether the network takes no views but those of ``config.size``."""
        name = self.config.encoder_name or ""
        return self.config.kind == "unetr" or (name.startswith(_TIMM) and _timm_settings(name).fixed_input_size)

    @property
    def num_classes(self) -> int:
        """Classes, background included."""
        assert self.config.num_classes is not None
        return self.config.num_classes

    @property
    def backbone(self) -> nn.Module | None:
        """The encoder, if it started from published weights."""
        return None if self.config.encoder_weights is None else self.network.get_submodule("encoder")

    @property
    def config_to_save(self) -> BaselineConfig:
        """The configuration without published weights: none are fetched for a model that is loaded."""
        return replace(self.config, encoder_weights=None)

    def forward(self, img: Tensor, bbox: Tensor | None = None) -> Tensor:
        """Segment the finest view of each sample.

        Args:
            img: ``(B, L, C, *space)``.
            bbox: not looked at; these networks know no coordinates.

        Returns:
            Logits ``(B, K, *space)`` of the finest view.

        Raises:
            ShapeError: the images have the wrong shape.
            InputError: their size does not fit, or the batch is too small for the network's normalisation.
        """
        self._check(img)
        return self.network(img.flatten(1, 2))

    def training_loss(self, batch: Mapping[str, Tensor], criterion: Criterion) -> tuple[Tensor, Tensor]:
        """Loss and logits as of `SegmentationModel.training_loss`; mask2former has a loss of its own."""
        if not isinstance(self.network, SwinMask2Former):
            return super().training_loss(batch, criterion)
        self._check(batch["img"])
        return self.network.loss(batch["img"].flatten(1, 2), batch["label"])

    def _check(self, img: Tensor) -> None:
        views, network = self.views, self.config.kind
        wanted = (len(views.levels), views.in_channels)
        if img.ndim != 3 + views.ndim or tuple(img.shape[1:3]) != wanted:
            shape = f"(B, {wanted[0]}, {wanted[1]}, {', '.join('zyx'[-views.ndim :])})"
            raise ShapeError("img", expected=f"shape {shape}", got=tuple(img.shape))
        views.check_size(img.shape[3:], "img")
        cells = prod(n // m for n, m in zip(img.shape[3:], views.multiple, strict=True))
        if network in ("residual_unet", "swinunetr") and cells == 1:
            raise InputError("img", expected=f"more than one cell of {views.multiple} px", got=tuple(img.shape[3:]))
        values = len(img) * cells if network in _REDUCED else len(img)
        if self.training and values == 1 and network in (*_POOLED, *_REDUCED):
            raise InputError("batch_size", expected=f"at least 2 to train {network}, which normalises batches", got=1)


def _build(config: BaselineConfig, channels: int) -> nn.Module:
    chosen = _NETWORKS[config.kind]
    for package in chosen.packages:
        require_package(package, f"network {config.kind}", package=package, install="'muvit[baselines]'")
    if chosen.packages == _HF:
        assert config.num_classes is not None
        size, width = config.encoder_name or chosen.encoder_name, config.width or chosen.width
        return SwinMask2Former(size, width, channels, config.num_classes, config.encoder_weights)
    return _build_smp(config, channels) if chosen.packages == _SMP else _build_monai(config, channels)


def _build_smp(config: BaselineConfig, channels: int) -> nn.Module:
    import segmentation_models_pytorch as smp

    kinds = {
        "unet": smp.Unet,
        "deeplabv3": smp.DeepLabV3,
        "deeplabv3plus": smp.DeepLabV3Plus,
        "upernet": smp.UPerNet,
        "fpn": smp.FPN,
        "segformer": smp.Segformer,
    }
    name, weights = config.encoder_name or _NETWORKS[config.kind].encoder_name, config.encoder_weights
    options: dict[str, object] = {}
    if name.startswith(_TIMM):
        settings = _timm_settings(name)
        published = ["timm"] if settings.has_weights else []
        options = {"img_size": config.size} if settings.fixed_input_size else {}
    elif name in smp.encoders.encoders:
        published = [*smp.encoders.encoders[name]["pretrained_settings"]]
    else:
        expected = f"an encoder of segmentation-models-pytorch, or {_TIMM} and the name of one of timm"
        raise InputError("encoder_name", expected=expected, got=repr(name))
    if weights not in (None, *published):
        expected = f"{' or '.join(published) or 'none'}, which are published for {name}"
        raise InputError("encoder_weights", expected=expected, got=repr(weights))
    start = True if weights == "timm" else weights
    try:
        return kinds[config.kind](
            name, encoder_weights=start, in_channels=channels, classes=config.num_classes, **options
        )
    except OSError as error:
        expected = f"a connection to fetch the weights {weights} of {name}"
        raise InputError("encoder_weights", expected=expected, got=_reason(error)) from error
    except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        # some encoders cannot be dilated, lack a stage, or have none at all
        got = f"{name}: {_reason(error)}"
        raise InputError("encoder_name", expected=f"one that {config.kind} can use", got=got) from error


def _timm_settings(name: str) -> Any:
    """The properties that timm states of an encoder, given by its name after ``tu-``."""
    require_package("timm", f"encoder {name}", package="timm", install="'muvit[baselines]'")
    import timm

    model = name.removeprefix(_TIMM)
    try:
        settings = timm.get_pretrained_cfg(model) if timm.is_model(model) else None
    except RuntimeError:  # weights of this tag are not known
        settings = None
    if settings is None:
        raise InputError("encoder_name", expected=f"{_TIMM} and the name of a model of timm", got=repr(name))
    return settings


def _build_monai(config: BaselineConfig, channels: int) -> nn.Module:
    from monai.networks.nets.swin_unetr import SwinUNETR
    from monai.networks.nets.unet import UNet
    from monai.networks.nets.unetr import UNETR

    chosen, classes, ndim = _NETWORKS[config.kind], config.num_classes, config.ndim
    assert classes is not None
    width = config.width or chosen.width
    if config.kind == "swinunetr":
        return SwinUNETR(channels, classes, feature_size=width, use_v2=True, spatial_dims=ndim)
    if config.kind == "residual_unet":
        widths = tuple(width * 2**i for i in range(5))
        return UNet(ndim, channels, classes, channels=widths, strides=(2, 2, 2, 2), num_res_units=2)
    assert config.size is not None
    dim, heads = _VIT[config.encoder_name or chosen.encoder_name]
    network = UNETR(
        channels,
        classes,
        config.size,
        feature_size=width,
        hidden_size=dim,
        mlp_dim=4 * dim,
        num_heads=heads,
        spatial_dims=ndim,
    )
    for block in network.vit.blocks:  # a norm for cross attention, of which UNETR has none
        block.norm_cross_attn.requires_grad_(False)
    return network


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
