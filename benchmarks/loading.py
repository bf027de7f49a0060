"""How fast cells come from a table, whole or streamed, in how much memory, and how long a step waits for them.

python benchmarks/loading.py                                                   two minutes, steps that only sleep
python benchmarks/loading.py --demo --num_cells 7083 --data_dir /tmp/phantoms  steps of the demo's autoencoder
python benchmarks/loading.py --num_cells 1000 7083 20000 --step_ms 0 --repeats 3 --data_dir /tmp/phantoms

7,083 is the paper's number of cells. What is in --data_dir already is not made again.
"""

import argparse
import itertools
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import psutil
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from diffusers_byoc import MultiCodebookVQModel
from diffusers_byoc.commands.train_arguments import PRESETS
from diffusers_byoc.data import (
    CellTable,
    StepBatches,
    StreamBatches,
    StreamedCells,
    Volume,
    VolumeProcessor,
    make_phantom,
    write_shards,
)
from diffusers_byoc.data.phantoms import PHENOTYPES
from diffusers_byoc.training import fastest_precision, reconstruction_loss


DEMO = json.loads((PRESETS / "demo.json").read_text(encoding="utf-8"))


def phantoms(num_cells: int, num_distinct: int):
    """(volume, columns) of `num_cells` phantoms; after `num_distinct` they repeat."""
    made = []
    for number in range(num_cells):
        if number < num_distinct:
            phantom = make_phantom(PHENOTYPES[number % len(PHENOTYPES)], seed=number)
            volume, label = Volume(phantom.volume, (1.0, 1.0, 1.0)), phantom.phenotype
            if num_distinct < num_cells:
                made.append((volume, label))
        else:
            volume, label = made[number % num_distinct]
        yield volume, {"label": label, "source": f"image {number // 20}"}


def prepare(folder: Path, num_cells: int, num_distinct: int) -> str:
    start, cpu_start = time.perf_counter(), time.process_time()
    write_shards(folder, phantoms(num_cells, num_distinct), cells_per_shard=500)
    megabytes = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    return f"{num_cells} cells: {seconds:.0f} s ({cpu_seconds:.0f} s of CPU) to make and write, {megabytes:.0f} MB."


def demo_step() -> Callable[[Tensor], None]:
    """Training steps of the demo's autoencoder, on a GPU where there is one, before the discriminator takes part."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vqvae = MultiCodebookVQModel(sample_size=64, **DEMO["vqvae"]).to(device).train()
    optimizer = torch.optim.AdamW(vqvae.parameters(), DEMO["arguments"]["autoencoder_learning_rate"])
    is_bf16 = fastest_precision() != "no"  # fp16 would need a scaler, and takes no less time

    def step(volumes: Tensor) -> None:
        volumes = volumes.to(device)
        with torch.autocast(device.type, torch.bfloat16) if is_bf16 else nullcontext():
            reconstruction, commit_loss, latents, indices = vqvae(volumes, return_dict=False)
        loss = reconstruction_loss(reconstruction.float(), volumes) + commit_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        vqvae.update_codebooks(latents, indices)
        loss.item()  # waits for a GPU to be done

    return step


def measure(folder: Path, is_streamed: bool, num_workers: int, num_batches: int, step_ms: float | None) -> dict:
    """Seconds to open a table, to the first batch, volumes per second, memory, and the share of time spent waiting.

    Args:
        step_ms: how long a step sleeps; None for steps of the demo.
    """
    if step_ms is None:
        step, batch_size = demo_step(), DEMO["arguments"]["autoencoder_train_batch_size"]
    else:  # a device at work, which leaves the CPU free
        torch.set_num_threads(1)
        step, batch_size = (lambda volumes: time.sleep(step_ms / 1e3)), 8
    start = time.perf_counter()
    cells = (StreamedCells if is_streamed else CellTable)(str(folder), VolumeProcessor())
    opened = time.perf_counter()
    # workers start as they would in a training script, not as this process did
    options = {"num_workers": num_workers}
    if num_workers:
        options["multiprocessing_context"] = multiprocessing.get_all_start_methods()[0]
    if is_streamed:
        loader = DataLoader(StreamBatches(cells, batch_size, 0, num_batches, 0), batch_size=None, **options)
    else:
        batches = StepBatches(len(cells), batch_size, 0, num_batches, 0)
        loader = DataLoader(cells, batch_sampler=batches, **options)
    iterator, waited, peak = iter(loader), 0.0, 0.0
    batch = next(iterator)
    first = time.perf_counter()
    step(batch["volumes"])  # not measured: it starts what starts once
    begin, cpu_seconds = time.perf_counter(), cpu_seconds_of_all_processes()
    for number in range(1, num_batches):
        asked = time.perf_counter()
        batch = next(iterator)
        waited += time.perf_counter() - asked
        step(batch["volumes"])
        if number % 8 == 0 and number < num_batches - 8:  # while all workers live; looking takes as long as reading
            looked = time.perf_counter()
            peak = max(peak, megabytes_of_all_processes())
            begin += time.perf_counter() - looked
    seconds, cpu_seconds = time.perf_counter() - begin, cpu_seconds_of_all_processes() - cpu_seconds
    return {
        "cpu": 1e3 * cpu_seconds / (num_batches - 1) / batch_size,
        "opened": opened - start,
        "first": first - opened,
        "step": 1e3 * (seconds - waited) / (num_batches - 1),
        "rate": (num_batches - 1) * batch_size / seconds,
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
    add = parser.add_argument
    add("--num_cells", type=int, nargs="+", default=[200, 1000])
    add("--num_distinct", type=int, help="phantoms to make; larger sets repeat them (default: none is repeated)")
    add("--data_dir", type=Path, help="keep the sets here (default: a folder that is deleted)")
    add("--num_workers", type=int, nargs="+", default=[0, 1, 2])
    add("--num_batches", type=int, default=40, help="of 8 cells, or of 4 with --demo, for each row")
    add("--step_ms", type=float, nargs="+", default=[0.0, 500.0], help="how long a step sleeps")
    add("--demo", action="store_true", help="training steps of the demo's autoencoder instead")
    add("--repeats", type=int, default=1, help="processes for each row, to see what is noise")
    args = parser.parse_args()

    print(
        "| cells | read | workers | step, ms | open, s | first batch, s | CPU ms/cell | cells/s | memory, MB |"
        " waiting |"
    )
    print("| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    notes, steps = [], [None] if args.demo else args.step_ms
    with tempfile.TemporaryDirectory() as temporary:
        for num_cells in args.num_cells:
            folder = (args.data_dir or Path(temporary)) / str(num_cells)
            if not folder.is_dir():
                notes.append(prepare(folder, num_cells, min(args.num_distinct or num_cells, num_cells)))
            for is_streamed, workers, step_ms in itertools.product((False, True), args.num_workers, steps):
                rows = [
                    measure_in_process(folder, is_streamed, workers, args.num_batches, step_ms)
                    for _ in range(args.repeats)
                ]
                row = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
                memory = "/".join(f"{row['memory']:.0f}" for row in rows)
                print(
                    f"| {num_cells} | {'streamed' if is_streamed else 'whole'} | {workers} | {row['step']:.0f} |"
                    f" {row['opened']:.1f} | {row['first']:.2f} | {row['cpu']:.1f} | {row['rate']:.0f} |"
                    f" {memory} | {row['waiting']:.1%} |",
                    flush=True,
                )
    print("\n".join(["", *notes]))


if __name__ == "__main__":
    main()
