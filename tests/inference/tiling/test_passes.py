from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from muvit.errors import InputError
from muvit.inference.run.refinement import Refinement
from muvit.inference.tiling.passes import Passes
from muvit.inference.tiling.tiles import TilePlan, mask_runs


@st.composite
def plans(draw):
    """Tiles that overlap by a half or more, some of which are left out."""
    ndim = draw(st.integers(1, 3))
    step, parts = draw(st.tuples(*[st.integers(2, 5)] * ndim)), draw(st.tuples(*[st.integers(2, 3)] * ndim))
    crop = tuple(n * k for n, k in zip(step, parts, strict=True))
    shape = draw(st.tuples(*[st.integers(1, 30)] * ndim))
    plan = TilePlan(
        shapes=(shape,),
        levels=(1,),
        crop_size=crop,
        block_size=draw(st.tuples(*[st.integers(5, 30)] * ndim)),
        overlap=tuple(n - s for n, s in zip(crop, step, strict=True)),
        refines=True,
    )
    chosen = np.random.default_rng(draw(st.integers(0, 99))).random(plan.grid) < draw(st.sampled_from([0.2, 1]))
    return replace(plan, runs=mask_runs(chosen))


def share_pixels(one, other):
    return all(
        abs(a - b) < n
        for a, b, n in zip(one.windows[0].start, other.windows[0].start, one.windows[0].size, strict=True)
    )


@settings(deadline=None, max_examples=40)
@given(plans())
def test_the_first_pass_computes_the_tiles_side_by_side_and_those_that_decide_in_every_block(plan):
    passes, tiles = Passes(plan), list(plan)
    first = {tile.windows for tile in tiles if passes.is_first(tile.place)}
    assert first == {tile.windows for tile in passes.side_by_side}
    by_place = {tile.place: tile for tile in tiles}
    for block in range(plan.num_blocks):
        own = [tiles[number] for number in plan.tiles_of(block)]
        between = [tile for tile in own if plan.computed[tile.place] and not passes.is_first(tile.place)]
        assert passes.is_between(block).sum() == len(between)
        deciding = {
            place
            for place, tile in by_place.items()
            if passes.is_first(place) and any(share_pixels(tile, other) for other in between)
        }
        written = {tile.place for tile in own if plan.computed[tile.place] and passes.is_first(tile.place)}
        numbers = passes.first_tiles(block)
        assert len({*numbers}) == len(numbers)
        assert {tiles[number].place for number in numbers} == deciding | written
        assert {tiles[number].place for number in numbers if plan.writes(tiles[number], block)} == written


@settings(deadline=None, max_examples=30)
@given(plans(), st.integers(0, 10**6))
def test_a_tile_of_the_first_pass_that_is_uncertain_wants_all_tiles_that_share_pixels_with_it(plan, draw):
    passes, tiles = Passes(plan), list(plan)
    first = sorted({tile.place for tile in tiles if passes.is_first(tile.place)})
    uncertain = next(tile for tile in tiles if tile.place == first[draw % len(first)])
    kinds = torch.tensor([[0.5, 1.0], [0.5, 0.0]]).reshape(2, 2, *(1,) * len(plan.shape))
    for block in range(plan.num_blocks):
        refinement = Refinement(
            SimpleNamespace(tiling=plan, options=SimpleNamespace(refine=0)), block, torch.device("cpu")
        )
        for tile in (tiles[number] for number in passes.first_tiles(block)):
            refinement.add(tile, kinds[:, int(tile.place != uncertain.place)].expand(2, *plan.crop_size))
        own = (tiles[number] for number in plan.tiles_of(block))
        between = [tile for tile in own if plan.computed[tile.place] and not passes.is_first(tile.place)]
        chosen = {tiles[number] for number in refinement.choose()}
        assert chosen == {tile for tile in between if share_pixels(tile, uncertain)}


def test_tiles_that_share_coarse_crops_are_consecutive_in_the_first_pass():
    levels = {"shapes": ((96, 96), (24, 24)), "levels": (1, 4), "crop_size": (8, 8), "block_size": (48, 48)}
    plan = TilePlan(**levels, overlap=(4, 4), placement="grid", refines=True)
    coarse = [plan.tile(number).windows[1] for number in Passes(plan).first_tiles(0)]
    assert sum(one != other for one, other in pairwise(coarse)) == len({*coarse}) - 1 > 3


@pytest.mark.parametrize("changes", [{"overlap": (0, 0)}, {"overlap": (4, 4)}, {"overlap": (8, 8), "blend": "center"}])
def test_tiles_that_do_not_fill_those_side_by_side_are_refused(changes):
    fields = {"shapes": ((99, 99),), "levels": (1,), "crop_size": (16, 16), "block_size": (40, 40), "overlap": (8, 8)}
    TilePlan(**fields, refines=True)
    with pytest.raises(InputError, match=r"refine: expected tiles that blend, and an overlap .* as 0\.5 does, got"):
        TilePlan(**fields | changes, refines=True)
