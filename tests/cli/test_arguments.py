"""Reading values of options."""

from __future__ import annotations

import click
import pytest

from bntools.cli.arguments import Bytes, Sizes
from bntools.cli.reading import IMAGENET_MEAN, IMAGENET_STD, PerChannel, Reading, reading_options


@pytest.mark.parametrize(
    ("text", "amount"), [("4GiB", 4 * 2**30), ("500MB", 500_000_000), ("1.5kib", 1536), ("12", 12), ("2 GB", 2 * 10**9)]
)
def test_amounts_of_memory(text, amount):
    """An amount of memory is read with decimal and binary units."""
    assert Bytes().convert(text, None, None) == amount


@pytest.mark.parametrize("text", ["", "lots", "4TiBs", "-1GB", "GiB"])
def test_no_amounts_of_memory(text):
    """What is no amount of memory is a usage error."""
    with pytest.raises(click.BadParameter):
        Bytes().convert(text, None, None)


@pytest.mark.parametrize(("text", "sizes"), [("224", (224,)), ("3,224,192", (3, 224, 192)), ("1x28x28", (1, 28, 28))])
def test_sizes(text, sizes):
    """Sizes are separated by commas or x."""
    assert Sizes(1, 3).convert(text, None, None) == sizes


@pytest.mark.parametrize("text", ["", "0", "-1", "a", "1,,2", "1,2,3,4", "1.5"])
def test_no_sizes(text):
    """What is not one to three positive whole numbers is a usage error."""
    with pytest.raises(click.BadParameter):
        Sizes(1, 3).convert(text, None, None)


def reading(*arguments: str) -> Reading:
    """What a command with the options for data receives."""
    seen = []
    command = click.command()(reading_options(lambda reading: seen.append(reading)))
    command.main(list(arguments), standalone_mode=False)
    return seen[0]


def test_imagenet_alone_sets_both():
    """--mean imagenet stands for ImageNet's mean and standard deviation."""
    read = reading("--mean", "imagenet")
    assert (read.mean, read.std) == (IMAGENET_MEAN, IMAGENET_STD)


def test_mean_and_std_as_numbers():
    """Mean and standard deviation are read one number a channel."""
    read = reading("--mean", "0.5,0", "--std", "1,2e-1")
    assert (read.mean, read.std) == ((0.5, 0.0), (1.0, 0.2))


@pytest.mark.parametrize("arguments", [["--mean", "0.5"], ["--std", "0.5"], ["--mean", "0", "--std", "0"]])
def test_half_a_normalization_is_refused(arguments):
    """A mean without a standard deviation, the reverse, and division by zero are usage errors."""
    with pytest.raises(click.UsageError):
        reading(*arguments)


def test_numbers_that_are_none():
    """What is no number is a usage error that shows what is expected."""
    with pytest.raises(click.BadParameter, match="imagenet"):
        PerChannel(IMAGENET_MEAN).convert("0.5;0.5", None, None)


def test_one_size_is_a_square():
    """--size 64 means height and width; two numbers are height, width."""
    assert reading("--size", "64").size == (64, 64)
    assert reading("--size", "64,48").size == (64, 48)
    assert reading().size is None
