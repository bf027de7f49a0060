import itertools

import pytest

from diffusers_byoc.data.sets.batches import StreamBatches


def runs(num_cells, batch_size, num_workers, num_epochs, num_processes=1):
    """Of each process: the rows that each worker reads in each epoch."""
    processes = [
        StreamBatches(range(num_cells), batch_size, 0, 1, 0, process_index=index, num_processes=num_processes)
        for index in range(num_processes)
    ]
    return [
        [[process._run(epoch, worker, num_workers) for worker in range(num_workers)] for epoch in range(num_epochs)]
        for process in processes
    ]


def test_the_example_of_the_documentation():
    ((first, second),) = runs(10, 3, 2, 2)
    assert first == [range(0, 6), range(6, 10)] and second == [range(0, 5), range(5, 10)]


@pytest.mark.parametrize(("num_cells", "batch_size", "num_workers"), [(10, 3, 2), (7, 4, 3), (2, 5, 4), (64, 8, 1)])
@pytest.mark.parametrize("num_processes", [1, 3])
def test_every_row_is_read_once_an_epoch_by_who_makes_its_batch(num_cells, batch_size, num_workers, num_processes):
    num_epochs = 6
    processes = runs(num_cells, batch_size, num_workers, num_epochs, num_processes)
    for epoch in range(num_epochs):
        rows = sorted(itertools.chain.from_iterable(itertools.chain.from_iterable(p[epoch] for p in processes)))
        assert rows == list(range(num_cells))
    for epochs in processes:
        # workers take turns, batch by batch: by brute force, how many cells of an epoch each one makes
        made, number = [], 0
        for workers in epochs:
            counts = [0] * num_workers
            for _ in range(sum(map(len, workers))):
                counts[number // batch_size % num_workers] += 1
                number += 1
            made.append(counts)
        assert [[len(run) for run in workers] for workers in epochs] == made
