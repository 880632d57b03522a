import pickle

import pytest

from muvit.errors import CheckpointError, ExistsError, InputError, MuViTError, ReadError, ShapeError


def test_a_message_says_what_was_expected_what_came_and_what_to_do():
    error = InputError("crop", expected="a multiple of 8", got=20, hint="Use 24.")
    assert str(error) == "crop: expected a multiple of 8, got 20. Use 24."
    assert isinstance(error, ValueError)


@pytest.mark.parametrize("kind", [InputError, ShapeError, ReadError, CheckpointError])
def test_errors_survive_the_way_between_processes(kind):
    error = kind("file", expected="this", got="that", hint="Do so.")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert str(copy) == str(error)


@pytest.mark.parametrize("error", [ExistsError("out"), ExistsError("out", hint="No."), MuViTError("plain")])
def test_so_do_those_made_otherwise(error):
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
