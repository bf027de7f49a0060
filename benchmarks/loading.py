"""How fast cells come from a table, whole or streamed, in how much memory, and how long a step waits for them.

python benchmarks/loading.py                                       two minutes
python benchmarks/loading.py --num_cells 1000 7083 20000           the paper's number of cells, and more
"""

import argparse
import itertools
import multiprocessing
import tempfile
import time
from pathlib import Path

import psutil
import torch
from torch.utils.data import DataLoader

from diffusers_byoc.data import (
    CellTable,
    StreamBatches,
    StreamedCells,
    Volume,
    VolumeProcessor,
    make_phantom,
    write_shards,
)
from diffusers_byoc.data.phantoms import PHENOTYPES
from diffusers_byoc.training import StepBatches


BATCH_SIZE = 8


def phantoms(num_cells: int, num_distinct: int):
    """(volume, columns) of `num_cells` phantoms; from `num_distinct` on they repeat, as making them takes longest."""
    made = []
    for number in range(num_cells):
        if len(made) < num_distinct:
            phantom = make_phantom(PHENOTYPES[number % len(PHENOTYPES)], seed=number)
            made.append((Volume(phantom.volume, (1.0, 1.0, 1.0)), phantom.phenotype))
        volume, label = made[number % num_distinct]
        yield volume, {"label": label, "source": f"image {number // 20}"}


def prepare(folder: Path, num_cells: int, num_distinct: int) -> dict:
    start = time.perf_counter()
    write_shards(folder, phantoms(num_cells, num_distinct), cells_per_shard=500)
    megabytes = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    return {"seconds": time.perf_counter() - start, "megabytes": megabytes}


def measure(folder: Path, is_streamed: bool, num_workers: int, num_batches: int, step_ms: float) -> dict:
    """Seconds to open a table, to the first batch, volumes per second, memory, and the share of time spent waiting."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    cells = (StreamedCells if is_streamed else CellTable)(str(folder), VolumeProcessor())
    opened = time.perf_counter()
    # workers start as they would in a training script, not as this process did
    options = {"num_workers": num_workers}
    if num_workers:
        options["multiprocessing_context"] = multiprocessing.get_all_start_methods()[0]
    if is_streamed:
        loader = DataLoader(StreamBatches(cells, BATCH_SIZE, 0, num_batches, 0), batch_size=None, **options)
    else:
        batches = StepBatches(len(cells), BATCH_SIZE, 0, num_batches, 0)
        loader = DataLoader(cells, batch_sampler=batches, **options)
    iterator, waited, peak = iter(loader), 0.0, 0.0
    next(iterator)
    first, cpu_seconds = time.perf_counter(), cpu_seconds_of_all_processes()
    for _ in range(num_batches - 1):
        begin = time.perf_counter()
        next(iterator)
        waited += time.perf_counter() - begin
        time.sleep(step_ms / 1e3)  # a device at work; the CPU is free
        peak = max(peak, megabytes_of_all_processes())
    seconds, cpu_seconds = time.perf_counter() - first, cpu_seconds_of_all_processes() - cpu_seconds
    return {
        "cpu": 1e3 * cpu_seconds / (num_batches - 1) / BATCH_SIZE,
        "opened": opened - start,
        "first": first - opened,
        "rate": (num_batches - 1) * BATCH_SIZE / seconds,
        "memory": peak,
        "waiting": waited / seconds,
    }


def megabytes_of_all_processes() -> float:
    """Memory of this process and its workers; on Linux what they share counts once, and pages of files do not."""
    process, total = psutil.Process(), 0
    for one in (process, *process.children()):
        rollup = Path(f"/proc/{one.pid}/smaps_rollup")
        if rollup.is_file():
            fields = dict(line.split(":") for line in rollup.read_text().splitlines()[1:])
            total += sum(int(fields[name].split()[0]) * 1024 for name in ("Pss_Anon", "Pss_Shmem"))
        else:
            total += one.memory_info().rss
    return total / 1e6


def cpu_seconds_of_all_processes() -> float:
    process = psutil.Process()
    used = [one.cpu_times() for one in (process, *process.children())]
    return sum(times.user + times.system for times in used)


def measure_in_process(*arguments) -> dict:
    """`measure` in a process of its own, so that no memory of the last one counts."""
    receiver, sender = multiprocessing.get_context("spawn").Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=_send, args=(sender, *arguments))
    process.start()
    sender.close()
    result = receiver.recv()
    process.join()
    return result


def _send(sender, *arguments) -> None:
    sender.send(measure(*arguments))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_cells", type=int, nargs="+", default=[200, 1000])
    parser.add_argument("--num_distinct", type=int, default=100, help="phantoms to make; larger sets repeat them")
    parser.add_argument("--num_workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--num_batches", type=int, default=40, help=f"of {BATCH_SIZE} cells, for each row")
    parser.add_argument("--step_ms", type=float, nargs="+", default=[0.0, 500.0], help="lengths of a training step")
    args = parser.parse_args()

    print(
        "| cells | read | workers | step, ms | open, s | first batch, s | CPU ms/cell | cells/s | memory, MB |"
        " waiting |"
    )
    print("| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    notes = []
    for num_cells in args.num_cells:
        with tempfile.TemporaryDirectory() as folder:
            made = prepare(Path(folder), num_cells, min(args.num_distinct, num_cells))
            notes.append(f"{num_cells} cells: {made['seconds']:.0f} s to make and write, {made['megabytes']:.0f} MB.")
            for is_streamed, workers, step_ms in itertools.product((False, True), args.num_workers, args.step_ms):
                row = measure_in_process(Path(folder), is_streamed, workers, args.num_batches, step_ms)
                print(
                    f"| {num_cells} | {'streamed' if is_streamed else 'whole'} | {workers} | {step_ms:g} |"
                    f" {row['opened']:.1f} | {row['first']:.2f} | {row['cpu']:.1f} | {row['rate']:.0f} |"
                    f" {row['memory']:.0f} | {row['waiting']:.1%} |",
                    flush=True,
                )
    print("\n".join(["", *notes]))


if __name__ == "__main__":
    main()
