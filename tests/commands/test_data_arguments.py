"""The groups of arguments about cells."""

import argparse

import pytest

from diffusers_byoc.commands.data_arguments import (
    add_loading_arguments,
    add_source_arguments,
    add_split_arguments,
    positive,
)
from diffusers_byoc.data.augmentation import ROTATIONS


def names(*groups):
    parser = argparse.ArgumentParser(add_help=False)
    for add in groups:
        add(parser)
    return set(vars(parser.parse_args([])))


def test_the_groups_share_no_argument():
    groups = [names(add) for add in (add_source_arguments, add_split_arguments, add_loading_arguments)]
    assert sum(map(len, groups)) == len(set.union(*groups))
    assert "train_data_dir" in groups[0] and "num_folds" in groups[1] and "streaming" in groups[2]


def test_every_augmentation_can_be_named():
    parser = argparse.ArgumentParser()
    add_loading_arguments(parser)
    (action,) = [action for action in parser._actions if action.dest == "augmentation"]
    assert tuple(action.choices) == ROTATIONS


def test_positive_numbers():
    assert positive("3") == 3
    with pytest.raises(argparse.ArgumentTypeError, match="at least 1, got 0"):
        positive("0")
