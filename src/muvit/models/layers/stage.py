"""Stages of a model, whose inner activations are kept for the backward pass or computed again in it."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

Result = TypeVar("Result")


class Stage(nn.Module):
    """A part of a model that can do without most of its activations, for the time of a second forward pass."""

    recomputes = False
    """Keep the inputs alone for the backward pass, and compute the activations again in it."""

    def run(self, function: Callable[..., Result], *args: Any, **options: Any) -> Result:
        """Call ``function``, whose activations are kept, or computed again if the stage recomputes."""
        if not (self.recomputes and torch.is_grad_enabled()):
            return function(*args, **options)
        return checkpoint(function, *args, use_reentrant=False, context_fn=self._contexts, **options)

    def _contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _same_statistics(self)


@contextmanager
def _same_statistics(stage: nn.Module) -> Iterator[None]:
    """Leave running means as the first forward pass left them: a second one would count the batch twice."""
    norms = [module for module in stage.modules() if isinstance(module, _BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
