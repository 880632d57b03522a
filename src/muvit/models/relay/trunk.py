"""The coupled branches: shared blocks, relay tokens that pass from branch to branch (Relay Tokens, figure 2)."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from muvit.models.relay.backbone import Backbone, Stream

POSITION_STD = 0.02
"""Spread of the relay tokens' rows in a position table, as of the table itself."""


class RelayTrunk(nn.Module):
    """A backbone that all branches share, and the relay tokens between them.

    Where the backbone has a table of positions, the relay tokens start from zero and have a row of their own in the
    table of every branch, added when they enter that branch for the first time. Else their start is drawn. In stages of
    growing width a linear layer takes them along.

    Args:
        backbone: the shared backbone.
        num_relay: relay tokens; 0 leaves the branches independent.
        update: ``sequential`` or ``mean``, see `RelayConfig.update`.
    """

    def __init__(self, backbone: Backbone, num_relay: int, update: Literal["sequential", "mean"]) -> None:
        super().__init__()
        self.backbone, self.update = backbone, update
        self.relay_tokens: nn.Parameter | None = None
        self.relay_positions: nn.Parameter | None = None
        self.widen = nn.ModuleList()
        if num_relay == 0:
            return
        widths = backbone.widths
        self.widen.extend(nn.Linear(a, b) for a, b in pairwise(widths))
        if backbone.has_positions():
            self.relay_tokens = nn.Parameter(torch.zeros(1, num_relay, widths[0]))
            rows = POSITION_STD * torch.randn(1, num_relay, widths[0])
            # one table is shared, or every branch has its own
            self.relay_positions = nn.Parameter(rows.repeat(1 + len(backbone.contexts), 1, 1))
        else:
            std = 1.0 if len(widths) > 1 else POSITION_STD
            self.relay_tokens = nn.Parameter(std * torch.randn(1, num_relay, widths[0]))

    def forward(self, img: Tensor, taps: Sequence[tuple[int, int]] = ()) -> list[list[Tensor]]:
        """Maps of all branches.

        Args:
            img: ``(B, L, C, *space)``, finest view first.
            taps: further blocks, as (stage, index), after which maps are kept; in the order of the backbone.

        Returns:
            For each branch, maps ``(B, D, *grid)``: the normalised output of the last block, then those of the taps,
            last block first.
        """
        streams = [self.backbone.embed(view, level) for level, view in enumerate(img.unbind(1))]
        relay = None if self.relay_tokens is None else self.relay_tokens.expand(img.shape[0], -1, -1)
        kept: list[list[Tensor]] = [[] for _ in streams]
        for stage, depth in enumerate(self.backbone.depths):
            streams = [self.backbone.enter(stage, stream) for stream in streams]
            relay = relay if relay is None or stage == 0 else self.widen[stage - 1](relay)
            for index in range(depth):
                streams, relay = self.couple(stage, index, streams, relay)
                if (stage, index) in taps:
                    for maps, stream in zip(kept, streams, strict=True):
                        maps.insert(0, self.backbone.to_map(stage, stream))
        last = len(self.backbone.depths) - 1
        outputs = [self.backbone.to_map(last, self.backbone.normalize(stream)) for stream in streams]
        return [[output, *maps] for output, maps in zip(outputs, kept, strict=True)]

    def couple(
        self, stage: int, index: int, streams: Sequence[Stream], relay: Tensor | None
    ) -> tuple[list[Stream], Tensor | None]:
        """One block on all branches: ``[T_g', r'] = block([T_g ; r])``, then ``[T_l', r''] = block([T_l ; r'])``.

        Args:
            stage: index of the stage.
            index: index of the block in it.
            streams: the branches, finest first.
            relay: relay tokens ``(B, R, D)``.

        Returns:
            The branches and the relay tokens after the block.
        """
        after, updates = list(streams), []
        for level in reversed(range(len(streams))):
            entering = self.place(relay, level) if stage == index == 0 else relay
            after[level], updated = self.backbone.run(stage, index, streams[level], entering)
            updates.append(updated)
            if self.update == "sequential":
                relay = updated
        if self.update == "mean" and relay is not None:
            relay = torch.stack([u for u in updates if u is not None]).mean(0)
        return after, relay

    def place(self, relay: Tensor | None, level: int) -> Tensor | None:
        """Add the relay tokens' positions in the table of the branch with index ``level``."""
        if relay is None or self.relay_positions is None:
            return relay
        return relay + self.relay_positions[min(level, len(self.relay_positions) - 1)]
