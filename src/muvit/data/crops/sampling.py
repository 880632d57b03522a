"""Order of the samples of an epoch: numbers that never repeat, shared out between processes."""

from collections.abc import Iterator

from torch.utils.data import Sampler

from muvit.errors import InputError


class EpochSampler(Sampler[int]):
    """Sample numbers that never repeat: epoch ``e`` of a data set of ``n`` samples is ``e * n ... (e + 1) * n - 1``.

    A data set that derives each sample from its number alone (`NestedCrops`) thus shows new crops in every epoch, the
    same ones for any number of workers or processes, and a run that is resumed in mid-epoch continues where it stopped.

    Args:
        num_samples: samples per epoch, over all processes.
        epoch: first epoch.
        start: samples of that epoch, over all processes, that were already drawn.
        rank: number of this process.
        num_replicas: number of processes, which take turns; a remainder that does not divide evenly is dropped.

    Raises:
        InputError: a number is out of range.
    """

    def __init__(
        self, num_samples: int, *, epoch: int = 0, start: int = 0, rank: int = 0, num_replicas: int = 1
    ) -> None:
        if not 0 <= rank < num_replicas:
            raise InputError("rank", expected=f"0 <= rank < {num_replicas} replicas", got=rank)
        if not 0 <= start <= num_samples or epoch < 0:
            got = f"start {start} of {num_samples} samples in epoch {epoch}"
            raise InputError("start", expected="0 <= start <= samples per epoch, epoch >= 0", got=got)
        self.num_samples = num_samples
        self.epoch = epoch
        self.start = start
        self.rank = rank
        self.num_replicas = num_replicas

    def set_epoch(self, epoch: int) -> None:
        """Set the next epoch, which begins at its first sample if it is another (called by Lightning)."""
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def __len__(self) -> int:
        return (self.num_samples - self.start) // self.num_replicas

    def __iter__(self) -> Iterator[int]:
        first = self.epoch * self.num_samples + self.start + self.rank
        return iter(range(first, first + len(self) * self.num_replicas, self.num_replicas))
