import pytest
import torch

from muvit.data.crops.dataset import MuViTDataset
from muvit.errors import InputError, ShapeError


class Views(MuViTDataset):
    """Levels come from the subclass's own constructor, after that of the base."""

    def __init__(self, levels=(1, 4), n_channels=3, ndim=2, img=None, bbox=None, length=2):
        super().__init__()
        self._levels, self._n_channels, self._ndim, self._length = levels, n_channels, ndim, length
        self.img = img or (len(levels), n_channels, *(16,) * ndim)
        self.bbox = bbox or (len(levels), 2, ndim)

    levels = property(lambda self: self._levels)
    n_channels = property(lambda self: self._n_channels)
    ndim = property(lambda self: self._ndim)

    def __len__(self):
        return self._length

    def __getitem__(self, index):
        return {"img": torch.zeros(self.img), "bbox": torch.full(self.bbox, -1.0)}


class LateViews(Views):
    """Sets what its samples depend on only after its parent is through."""

    def __init__(self):
        super().__init__()
        self.img = (2, 3, 16)


class Incomplete(Views):
    def __getitem__(self, index):
        return {"img": torch.zeros(self.img), "boxes": torch.zeros(self.bbox)}


@pytest.mark.parametrize("ndim", [1, 2, 3, 4])
@pytest.mark.parametrize("levels", [(1,), [1, 8, 32], (1.0, 2.5)])
def test_fitting_samples_are_accepted_whatever_the_boxes_hold(ndim, levels):
    dataset = Views(levels=levels, ndim=ndim)
    assert dataset.n_levels == len(levels)
    assert dataset[0]["bbox"].shape == (len(levels), 2, ndim)


@pytest.mark.parametrize("img", [(1, 2, 3, 16, 16), (3, 3, 16, 16), (2, 1, 16, 16), (2, 3, 16), (2, 3, 16, 16, 16)])
def test_image_of_another_shape_is_refused(img):
    with pytest.raises(ShapeError, match=r"Views\[0\]\['img'\]: expected .*2 levels, 3 channels, 2 spatial") as error:
        Views(img=img)
    assert str(img) in str(error.value)


@pytest.mark.parametrize("bbox", [(1, 2, 2, 2), (3, 2, 2), (2, 2, 3), (2, 4)])
def test_boxes_of_another_shape_are_refused(bbox):
    with pytest.raises(ShapeError, match=r"\['bbox'\]: expected shape \(2, 2, 2\), got") as error:
        Views(bbox=bbox)
    assert str(bbox) in str(error.value)


def test_check_waits_for_the_outermost_constructor():
    with pytest.raises(ShapeError, match="LateViews"):
        LateViews()


def test_missing_key_and_empty_set_are_refused():
    with pytest.raises(InputError, match=r"'img' and 'bbox', got \['boxes', 'img'\]"):
        Incomplete()
    with pytest.raises(InputError, match="at least one sample"):
        Views(length=0)


def test_base_class_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        MuViTDataset()
