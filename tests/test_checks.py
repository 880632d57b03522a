import math
from dataclasses import dataclass
from typing import Annotated, Literal

import pytest

from muvit.checks import Bounds, NonNegative, Positive, PositiveInt, Share, check_fields, freeze_lists
from muvit.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Inner:
    side: PositiveInt = 1

    def __post_init__(self):
        check_fields(self, prefix="inner.")


@dataclass(frozen=True, kw_only=True)
class Config:
    mode: Literal["all", "same", 2] = "all"
    sides: PositiveInt | tuple[PositiveInt, ...] = 8
    pair: tuple[PositiveInt, Positive] | None = None
    weight: NonNegative = 0.0
    rate: Positive = 1.0
    share: Share = 0.0
    year: Annotated[int, Bounds(min=2, max=4)] = 2
    any_number: Annotated[float, Bounds()] = 0.0
    widths: Literal["paper"] | tuple[int, ...] = "paper"
    inner: Inner = Inner()
    note: str = ""
    levels: tuple[float, ...] = ()

    def __post_init__(self):
        freeze_lists(self)
        check_fields(self)


@pytest.mark.parametrize(
    "fields",
    [
        {"mode": "same"},
        {"mode": 2},
        {"sides": 1},
        {"sides": (1, 2)},
        {"sides": ()},
        {"pair": (3, 0.5)},
        {"pair": None},
        {"weight": 0},
        {"share": 0.999},
        {"year": 4},
        {"any_number": -1e300},
        {"widths": (0, -3)},
        {"note": 3},  # a plain type is not checked
        {"levels": "all"},
    ],
)
def test_what_the_type_allows_is_accepted(fields):
    Config(**fields)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"mode": "some"}, "mode: expected all or same or 2, got 'some'."),
        ({"mode": True}, "mode: expected all or same or 2, got True."),
        ({"mode": 2.0}, "mode: expected all or same or 2, got 2.0."),
        ({"sides": 0}, "sides: expected a whole number >= 1 or a list, each item a whole number >= 1, got 0."),
        ({"sides": (1, 0)}, "got (1, 0)."),
        ({"sides": 1.5}, "got 1.5."),
        ({"sides": True}, "got True."),
        ({"sides": None}, "got None."),
        ({"sides": "8"}, "got '8'."),
        ({"pair": (3,)}, "pair: expected (a whole number >= 1, a number > 0), got (3,)."),
        ({"pair": (3, 0)}, "pair: expected"),
        ({"pair": (0, 3)}, "pair: expected"),
        ({"weight": -1e-9}, "weight: expected a number >= 0, got -1e-09."),
        ({"weight": math.inf}, "weight: expected a number >= 0, got inf."),
        ({"weight": math.nan}, "weight: expected a number >= 0, got nan."),
        ({"rate": 0}, "rate: expected a number > 0, got 0."),
        ({"share": 1}, "share: expected a number >= 0 and < 1, got 1."),
        ({"year": 5}, "year: expected a whole number >= 2 and <= 4, got 5."),
        ({"any_number": -math.inf}, "any_number: expected a number that is finite, got -inf."),
        ({"widths": "slim"}, "widths: expected paper or a list, each item a whole number, got 'slim'."),
        ({"inner": {"side": 1}}, "inner: expected Inner, got {'side': 1}."),
    ],
)
def test_what_it_does_not_allow_is_refused_with_what_it_allows(fields, message):
    with pytest.raises(InputError) as refusal:
        Config(**fields)
    assert message in str(refusal.value)


def test_the_name_of_the_field_may_have_a_prefix():
    with pytest.raises(InputError, match=r"inner\.side: expected a whole number >= 1, got 0"):
        Inner(side=0)


def test_lists_become_tuples():
    assert Config(sides=[1, 2], levels=[[1, 2], [3]]).sides == (1, 2)
    assert Config(levels=[[1, 2], [3]]).levels == ((1, 2), (3,))
