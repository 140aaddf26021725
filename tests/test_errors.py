"""The exception tree."""

from __future__ import annotations

import pickle

from shardwise import errors


def test_every_error_is_one_of_ours() -> None:
    for name in errors.__all__:
        assert issubclass(getattr(errors, name), (errors.ShardwiseError, errors.ShardwiseWarning))


def test_every_error_is_drawn_and_exported() -> None:
    defined = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, (Exception, Warning))}
    assert set(errors.__all__) == defined
    assert errors.__doc__ is not None
    assert all(name in errors.__doc__ for name in defined)


def test_a_rank_failure_survives_being_sent() -> None:
    error = errors.RankFailed(rank=1, ranks=4, kind="ValueError", reason="x", trace="line")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
