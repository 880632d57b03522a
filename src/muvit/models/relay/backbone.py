"""Interface of a timm backbone of any family that the coupling of branches needs."""

from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.func import functional_call


class Stream(NamedTuple):
    """A view on its way through the blocks."""

    tokens: Tensor
    """``(B, N, D)``, class and register tokens first; in a Swin Transformer ``(B, *grid, C)``."""
    rotation: Tensor | None = None
    """Rotation of queries and keys in the form that timm expects."""


class Backbone(nn.Module):
    """A timm model, taken apart where relay tokens come in; its blocks are shared by all branches.

    Args:
        timm: the model, without its classifier.
        own: parameters that each context branch has for itself, as prefixes of their names in this module.
        num_contexts: context branches with such parameters of their own, which start as copies.
    """

    timm: Any
    """timm's model: its parts are called, none is written again."""
    depths: tuple[int, ...]
    """Blocks of each stage; a Vision Transformer has one stage."""
    widths: tuple[int, ...]
    """Token width of each stage."""
    stride: tuple[int, int]
    """Pixels of a view along each axis for one token of the last stage."""

    def __init__(self, timm: nn.Module, own: tuple[str, ...], num_contexts: int) -> None:
        super().__init__()
        self.timm = timm
        named = {name: p for name, p in self.named_parameters() if name.startswith(own)}
        self.own_names = tuple(named)
        self.contexts = nn.ModuleList(
            nn.ParameterDict({_key(name): p.detach().clone() for name, p in named.items()}) for _ in range(num_contexts)
        )

    def embed(self, view: Tensor, level: int) -> Stream:
        """Tokens of the view ``(B, C, *space)`` of the branch with index ``level``, before the first block."""
        if level == 0 or not self.contexts:
            return self(view)
        stream: Stream = functional_call(self, self.own(level), (view,), tie_weights=False)
        return stream

    def own(self, level: int) -> dict[str, Tensor]:
        """The parameters that the context branch with index ``level`` has for itself, by the name of the local ones."""
        copies: Any = self.contexts[level - 1]
        return {name: copies[_key(name)] for name in self.own_names}

    def forward(self, view: Tensor) -> Stream:
        """Tokens of a view ``(B, C, *space)`` before the first block."""
        raise NotImplementedError

    def enter(self, stage: int, stream: Stream) -> Stream:
        """The stream at the beginning of a stage."""
        raise NotImplementedError

    def run(self, stage: int, index: int, stream: Stream, relay: Tensor | None) -> tuple[Stream, Tensor | None]:
        """One block on the tokens of a stream and the relay tokens ``(B, R, D)`` together."""
        raise NotImplementedError

    def to_map(self, stage: int, stream: Stream) -> Tensor:
        """Tokens after a stage (or within it) as a map ``(B, D, *grid)``, without class and register tokens."""
        raise NotImplementedError

    def normalize(self, stream: Stream) -> Stream:
        """The stream after the last block, through the backbone's final norm."""
        return stream._replace(tokens=self.timm.norm(stream.tokens))

    def has_positions(self) -> bool:
        """Whether tokens carry positions from a learned table."""
        return False


def _key(name: str) -> str:
    # a dictionary of parameters takes no dots
    return name.removeprefix("timm.").replace(".", "_")
