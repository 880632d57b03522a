import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from muvit.errors import InputError
from muvit.models.masking import draw_consistent_mask, draw_mask


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def budgets(mask, num_levels):
    """Visible tokens of each level in each sample, ``(B, L)``."""
    per_level = mask.order.shape[1] // num_levels
    return torch.stack([(mask.visible // per_level == i).sum(1) for i in range(num_levels)], dim=1)


def p_value(counts, expected):
    return stats.chisquare(counts, np.asarray(expected) * (np.sum(counts) / np.sum(expected))).pvalue


@given(
    batch=st.integers(1, 4),
    num_levels=st.integers(1, 4),
    tokens=st.integers(1, 40),
    ratio=st.floats(0, 1),
    mode=st.sampled_from(["dirichlet", "counts", "random"]),
    share=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_a_mask_is_a_permutation_with_a_fixed_number_of_visible_tokens(
    batch, num_levels, tokens, ratio, mode, share, seed
):
    mask = draw_mask(
        batch, num_levels, tokens, ratio=ratio, mode=mode, share_draw=share, generator=seeded(seed), alpha=0.5
    )
    count = num_levels * tokens
    assert mask.num_visible == int(count * (1 - ratio))
    assert torch.equal(mask.order.sort(1).values, torch.arange(count).expand(batch, -1))
    assert torch.equal(torch.cat([mask.visible, mask.masked], 1), mask.order)
    assert torch.equal(mask.is_masked.long(), torch.zeros(batch, count, dtype=torch.long).scatter(1, mask.masked, 1))


def test_a_quarter_is_visible_by_default():
    assert draw_mask(2, 3, 1024).num_visible == 768


@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_budgets_of_two_levels_follow_the_dirichlet_distribution(alpha):
    # five tokens out of so many hardly deplete a level, so the budget is beta-binomial
    mask = draw_mask(4000, 2, 500, ratio=0.995, alpha=alpha, generator=seeded())
    counts = np.bincount(budgets(mask, 2)[:, 0], minlength=6)
    assert p_value(counts, stats.betabinom(5, alpha, alpha).pmf(range(6))) > 1e-3
    assert p_value(counts, stats.binom(5, 0.5).pmf(range(6))) < 1e-6


def test_budgets_of_many_tokens_follow_draws_without_replacement():
    num_levels, tokens, samples = 3, 8, 3000
    rng = np.random.default_rng(0)
    reference = np.zeros((samples, num_levels), dtype=int)
    for i, weights in enumerate(np.maximum(rng.dirichlet([0.5] * num_levels, samples), 1e-30)):
        p = np.repeat(weights, tokens)
        chosen = rng.choice(num_levels * tokens, 6, replace=False, p=p / p.sum())
        reference[i] = np.bincount(chosen // tokens, minlength=num_levels)
    ours = budgets(draw_mask(samples, num_levels, tokens, generator=seeded()), num_levels).numpy()
    for level in range(num_levels):
        table = [np.bincount(x[:, level], minlength=7) for x in (ours, reference)]
        assert stats.chi2_contingency(table).pvalue > 1e-3


@pytest.mark.parametrize("mode", ["dirichlet", "counts", "random", (1.0, 5.0)])
def test_tokens_within_a_level_are_alike(mode):
    mask = draw_mask(4000, 2, 16, mode=mode, generator=seeded())
    seen = (~mask.is_masked).sum(0).reshape(2, 16).numpy()
    for level in range(2):
        # visibilities of one sample repel each other, which makes the statistic smaller than chi-square, not larger
        assert p_value(seen[level], np.ones(16)) > 1e-3


def test_counts_are_the_rounded_shares_of_the_draw():
    # of two levels, Dirichlet(1, 1) gives each a uniform share: of 8 tokens 0 to 8, those at the ends half as often
    mask = draw_mask(4000, 2, 16, mode="counts", alpha=1, generator=seeded())
    shares = np.array([0.5, *[1] * 7, 0.5])
    assert p_value(np.bincount(budgets(mask, 2)[:, 0], minlength=9), shares) > 1e-3
    weighted = draw_mask(4000, 2, 16, alpha=1, generator=seeded())
    assert p_value(np.bincount(budgets(weighted, 2)[:, 0], minlength=9), shares) < 1e-6
    # equal shares of 7 tokens round to 2 each, and chance adds the seventh; a level of 3 tokens gives no more than 3
    even = budgets(draw_mask(900, 3, 9, ratio=0.72, mode="counts", alpha=1e9, generator=seeded()), 3)
    assert {tuple(sorted(row)) for row in even.tolist()} == {(2, 2, 3)}
    assert p_value(even.argmax(1).bincount().numpy(), np.ones(3)) > 1e-3
    full = budgets(draw_mask(100, 2, 3, ratio=0.3, mode="counts", alpha=1e-6, generator=seeded()), 2)
    assert {tuple(sorted(row)) for row in full.tolist()} == {(1, 3)}


def test_random_mode_gives_hypergeometric_budgets():
    mask = draw_mask(4000, 2, 8, mode="random", generator=seeded())
    counts = np.bincount(budgets(mask, 2)[:, 0], minlength=5)
    assert p_value(counts, stats.hypergeom(16, 8, 4).pmf(range(5))) > 1e-3


def test_every_sample_has_its_own_budget_unless_the_draw_is_shared():
    own = budgets(draw_mask(64, 2, 256, generator=seeded(3)), 2)[:, 0].float()
    shared = budgets(draw_mask(64, 2, 256, share_draw=True, generator=seeded(3)), 2)[:, 0].float()
    assert own.std() > 30  # of 128 visible tokens; Beta(1/2, 1/2) has a standard deviation of 0.35
    assert shared.std() < 8  # binomial noise only: at most sqrt(128) / 2
    orders = draw_mask(64, 2, 256, share_draw=True, generator=seeded(3)).order
    assert len({tuple(row.tolist()) for row in orders}) == 64


def test_weights_prefer_levels():
    mask = draw_mask(2000, 2, 500, ratio=0.999, mode=(1.0, 3.0), generator=seeded())
    finest = int(budgets(mask, 2)[:, 0].sum())
    assert stats.binomtest(finest, 2000, 0.25).pvalue > 1e-3


def test_a_level_without_weight_is_seen_only_when_the_others_are_used_up():
    assert budgets(draw_mask(8, 2, 10, ratio=0.5, mode=(0.0, 1.0), generator=seeded()), 2).tolist() == [[0, 10]] * 8
    assert budgets(draw_mask(8, 2, 10, ratio=0.2, mode=(0.0, 1.0), generator=seeded()), 2).tolist() == [[6, 10]] * 8


def test_ratios_are_exact():
    mask = draw_mask(8, 3, 20, mode=(0.5, 0.75, 1.0), is_ratio=True, ratio=0.1, generator=seeded())
    assert budgets(mask, 3).tolist() == [[10, 5, 0]] * 8
    assert mask.num_visible == 15
    assert len({tuple(sorted(row.tolist())) for row in mask.visible}) == 8


@pytest.mark.parametrize("alpha", [1e-6, 1e-3, 1e3])
def test_extreme_budgets_stay_whole(alpha):
    mask = draw_mask(500, 3, 12, alpha=alpha, generator=seeded())
    assert budgets(mask, 3).sum(1).tolist() == [9] * 500
    assert torch.equal(mask.order.sort(1).values, torch.arange(36).expand(500, -1))
    if alpha == 1e-6:  # one level has all the weight
        assert budgets(mask, 3).max(1).values.tolist() == [9] * 500


def test_a_generator_decides_the_mask():
    first, again, other = (draw_mask(4, 2, 16, generator=seeded(s)).order for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_consistent_masks_agree_on_common_levels():
    full = draw_consistent_mask(3, (1, 8, 32), 16, generator=seeded(5)).is_masked.unflatten(1, (3, 16))
    coarse = draw_consistent_mask(3, (32,), 16, generator=seeded(5)).is_masked
    pair = draw_consistent_mask(3, (32, 1), 16, generator=seeded(5)).is_masked.unflatten(1, (2, 16))
    assert torch.equal(full[:, 2], coarse)
    assert torch.equal(full[:, [2, 0]], pair)
    assert full.sum(-1).tolist() == [[12] * 3] * 3
    assert not torch.equal(full[0], full[1])
    assert not torch.equal(full[:, 0], full[:, 1])
    assert not torch.equal(coarse, draw_consistent_mask(3, (32,), 16, generator=seeded(6)).is_masked)


@pytest.mark.parametrize("mode", [(1.0,), (1.0, -1.0), (0.0, 0.0), "uniform"])
def test_weights_that_do_not_fit_are_refused(mode):
    with pytest.raises(InputError, match="masking_mode"):
        draw_mask(1, 2, 4, mode=mode)


@pytest.mark.parametrize("ratio", [-0.1, 1.1, float("nan")])
def test_ratios_that_are_no_shares_are_refused(ratio):
    with pytest.raises(InputError, match="masking_ratio"):
        draw_mask(1, 2, 4, ratio=ratio)
    with pytest.raises(InputError, match="masking_ratio"):
        draw_consistent_mask(1, (1, 4), 4, ratio=ratio)
    with pytest.raises(InputError, match="masking_mode"):
        draw_mask(1, 2, 4, mode=(0.5, ratio), is_ratio=True)
