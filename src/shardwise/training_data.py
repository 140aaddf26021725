"""What a command's --data names.

(nothing)           Python's own sources, as bytes
book.txt, books/    text, as bytes: for models of input_ids and labels
images/             a subfolder a class: for models of pixel_values and labels
recordings/         a subfolder a class: for models of input_values and labels
file.py:function    a function of the user's own that returns a dataset or a stream, or one to train on and a dataset to evaluate on
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import Dataset, Subset

from shardwise.data.corpus import Corpus, first_samples
from shardwise.data.files import AudioFolder, ImageFolder
from shardwise.data.loader import has_numbers
from shardwise.data.text import ByteText
from shardwise.errors import DataError
from shardwise.models import call_function

__all__ = ["Inputs", "read_corpus"]

Inputs = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]  # of the model: name → dtype, shape with the samples first
_HELD_OUT_EVERY = 20  # of the samples, one in so many is held out


def read_corpus(spec: str | None, inputs: Inputs) -> Corpus:
    """The data that `spec` names, for a model with these inputs; part of it is held out.

    Raises DataError where there is no such data, or it is not what the model takes.
    """
    names = set(inputs)
    if spec is not None and ":" in spec and spec.rpartition(":")[0].endswith(".py"):
        return _checked(_own(spec), inputs)
    if names == {"input_ids", "labels"}:
        return ByteText.load(spec, sequence=_length(inputs, "input_ids", 1, 2)).corpus
    if spec is not None and names == {"pixel_values", "labels"}:
        return _divided(ImageFolder(spec, size=_length(inputs, "pixel_values", -1, 4)), spec)
    if spec is not None and names == {"input_values", "labels"}:
        return _divided(AudioFolder(spec, samples=_length(inputs, "input_values", 1, 2)), spec)
    raise DataError(
        f"the model's batch is {', '.join(sorted(names))}; data are read for input_ids and labels (text), and from a folder for "
        "pixel_values and labels (images) or input_values and labels (recordings). For other data give --data "
        "FILE.py:FUNCTION, which returns a dataset"
    )


def _length(inputs: Inputs, name: str, dim: int, dims: int) -> int:
    shape = inputs[name][1]
    if len(shape) != dims:
        raise DataError(f"{name} of the model's example batch is {list(shape)}; it must have {dims} dims to be read from files")
    return shape[dim]


def _divided(data: Dataset[Any], name: str) -> Corpus:
    """One sample in twenty is held out, at least one."""
    count = len(data)  # type: ignore[arg-type]
    held_out = range(0, count, _HELD_OUT_EVERY)
    if count < 2:
        raise DataError(f"{name} has {count} sample; at least 2 are needed: one to train on and one held out")
    training = [index for index in range(count) if index % _HELD_OUT_EVERY]
    return Corpus(name=name, training=Subset(data, training), held_out=Subset(data, list(held_out)))


def _own(spec: str) -> Corpus:
    found = call_function(spec)
    training, held_out = found if isinstance(found, tuple) and len(found) == 2 else (found, None)
    stream = hasattr(training, "__iter__") and not isinstance(training, Iterator)  # an iterator is at its end after one epoch
    if not (has_numbers(training) or stream) or not (held_out is None or has_numbers(held_out)):
        kinds = " and ".join(type(data).__name__ for data in (training, held_out) if data is not None)
        raise DataError(
            f"{spec} must return a dataset with __len__ and __getitem__ or a stream with __iter__, or two, to train and to evaluate on "
            f"(of which the second is no stream); it returned {kinds}"
        )
    return Corpus(name=spec, training=training, held_out=held_out)


def _checked(corpus: Corpus, inputs: Inputs) -> Corpus:
    """That a sample is what the model takes."""
    found_samples = first_samples(corpus.training, 1)
    if not found_samples:
        raise DataError(f"{corpus.name} returned a dataset without samples")
    (sample,) = found_samples
    if not isinstance(sample, Mapping):
        raise DataError(f"a sample of {corpus.name} is a {type(sample).__name__}; it must be a dict of the model's inputs {sorted(inputs)}")
    for name, (dtype, shape) in inputs.items():
        found = torch.as_tensor(sample[name]) if name in sample else None
        if found is None or found.dtype != dtype or tuple(found.shape) != shape[1:]:
            given = "missing" if found is None else f"{found.dtype} {list(found.shape)}"
            raise DataError(f"{name} in a sample of {corpus.name} is {given}; the model's example batch has {dtype} {list(shape[1:])}")
    return corpus
