import pytest
import torch

from diffusers_byoc.data import StepBatches
from diffusers_byoc.data.sets.batches import batch_indices
from diffusers_byoc.randomness import process_share, step_generator


def draw(*arguments):
    return torch.rand(4, generator=step_generator(*arguments)).tolist()


def test_a_stream_depends_on_seed_step_and_name_alone():
    torch.rand(7)  # the global generator has no say
    assert draw(0, 5, "noise") == draw(0, 5, "noise")
    streams = [(0, 5, "noise"), (1, 5, "noise"), (0, 6, "noise"), (0, 5, "data"), (5, 0, "noise"), (0, 5, "noises")]
    assert len({tuple(draw(*stream)) for stream in streams}) == len(streams)


@pytest.mark.parametrize(("num_items", "batch_size"), [(12, 4), (10, 4), (3, 8), (1, 2), (7, 7)])
def test_every_epoch_is_a_permutation(num_items, batch_size):
    num_epochs = 2 * batch_size  # whole batches fill them
    num_batches = num_epochs * num_items // batch_size
    stream = torch.cat([batch_indices(num_items, batch_size, batch, seed=3) for batch in range(num_batches)])
    epochs = stream.view(num_epochs, num_items)
    assert (epochs.sort(dim=1).values == torch.arange(num_items)).all()


def test_epochs_and_seeds_shuffle_differently():
    first, second = (batch_indices(50, 50, epoch, seed=0) for epoch in (0, 1))
    assert not torch.equal(first, second)
    assert not torch.equal(first, batch_indices(50, 50, 0, seed=1))


@pytest.mark.parametrize("num_processes", [2, 3])
def test_processes_share_the_batches_of_one(num_processes):
    whole = list(StepBatches(10, 6, 0, 9, seed=0))
    parts = [list(StepBatches(10, 6 // num_processes, 0, 9, 0, rank, num_processes)) for rank in range(num_processes)]
    assert [sum(batches, []) for batches in zip(*parts, strict=True)] == whole


@pytest.mark.parametrize("first", [0, 1, 5, 9])
def test_resumed_batches_are_the_tail_of_the_unbroken_ones(first):
    unbroken = list(StepBatches(7, 3, 0, 9, seed=2))
    resumed = StepBatches(7, 3, first, 9 - first, seed=2)
    assert list(resumed) == unbroken[first:] and len(resumed) == 9 - first


def test_batches_can_be_gone_through_twice_and_feed_a_loader():
    batches = StepBatches(7, 3, 4, 5, seed=0)
    assert list(batches) == list(batches)
    loader = torch.utils.data.DataLoader(torch.arange(7), batch_sampler=batches, num_workers=0)
    assert [batch.tolist() for batch in loader] == list(batches)


def test_shares_are_the_rows_in_order():
    rows = torch.arange(12).view(6, 2)
    assert torch.equal(process_share(rows, 0, 1), rows)
    assert torch.equal(torch.cat([process_share(rows, rank, 3) for rank in range(3)]), rows)
    assert process_share(rows, 1, 3).tolist() == [[4, 5], [6, 7]]
