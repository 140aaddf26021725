"""Parameters' names as the modules that hold them."""

from shardwise.program.holdings import modules_held


def test_blocks_are_told_together() -> None:
    names = [
        "model.embed.weight",
        "model.layers.0.q.weight",
        "model.layers.0.k.weight",
        "model.layers.1.q.weight",
        "model.layers.5.q.weight",
        "norm.bias",
    ]
    assert modules_held(names) == ["model.embed", "model.layers.0 … 1", "model.layers.5", "norm"]


def test_bare_names() -> None:
    assert modules_held(["0.weight", "1.bias", "scale", "0.0.weight"]) == ["0 … 1", "scale"]
