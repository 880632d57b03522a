"""Base class of the data sets that models of this package train on: views of one scene, and their boxes."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import wraps
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from muvit.errors import InputError, ShapeError
from muvit.levels import Level


class MuViTDataset(Dataset[dict[str, Tensor]], ABC):
    """Base class of multi-resolution data sets.

    A subclass gives `levels`, `n_channels`, `ndim`, ``__len__`` and ``__getitem__``, which returns a dict with

    * ``img``: ``(L, C, *space)``, one view per level, all of the same pixel size;
    * ``bbox``: ``(L, 2, ndim)``, lower and upper corner of each view in world pixels, axis order (t)(z)yx;
    * further entries that its model needs, such as ``label``: ``(*space)`` of the finest view.

    One sample is drawn and its shapes are checked as soon as an instance has been made.

    Raises:
        InputError: the data set is empty, or a sample lacks ``img`` or ``bbox``.
        ShapeError: ``img`` or ``bbox`` has another shape.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        construct = cls.__init__

        @wraps(construct)
        def construct_and_check(self: "MuViTDataset", *args: Any, **kwargs: Any) -> None:
            construct(self, *args, **kwargs)
            if type(self) is cls:  # the outermost constructor: only now can a sample be drawn
                self.check_sample()

        cls.__init__ = construct_and_check  # type: ignore[assignment, method-assign]

    @property
    @abstractmethod
    def levels(self) -> Sequence[Level]:
        """Downsampling factors of the views, finest first."""

    @property
    @abstractmethod
    def n_channels(self) -> int:
        """Number of channels of every view."""

    @property
    @abstractmethod
    def ndim(self) -> int:
        """Number of spatial axes, time included."""

    @property
    def n_levels(self) -> int:
        """Number of views of a sample."""
        return len(self.levels)

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> dict[str, Tensor]: ...

    def check_sample(self) -> None:
        """Draw the first sample and check the shapes of its views and boxes.

        Raises:
            InputError: the data set is empty, or the sample is no dict with ``img`` and ``bbox``.
            ShapeError: ``img`` is not ``(L, C, *space)`` or ``bbox`` not ``(L, 2, ndim)``.
        """
        name = type(self).__name__
        if len(self) == 0:
            raise InputError(name, expected="at least one sample", got="an empty data set")
        sample = self[0]
        if not isinstance(sample, Mapping) or not {"img", "bbox"} <= set(sample):
            keys = sorted(map(str, sample)) if isinstance(sample, Mapping) else type(sample).__name__
            raise InputError(f"{name}[0]", expected="a dict with the keys 'img' and 'bbox'", got=keys)
        levels, channels, ndim = self.n_levels, self.n_channels, self.ndim
        img, bbox = tuple(sample["img"].shape), tuple(sample["bbox"].shape)
        if len(img) != 2 + ndim or img[:2] != (levels, channels):
            expected = f"shape ({levels} levels, {channels} channels, {ndim} spatial axes)"
            raise ShapeError(f"{name}[0]['img']", expected=expected, got=img)
        if bbox != (levels, 2, ndim):
            raise ShapeError(f"{name}[0]['bbox']", expected=f"shape {(levels, 2, ndim)}", got=bbox)
