"""This package's networks against MedicalDiffusion's, MONAI's and vector-quantize-pytorch's, as ratios in one run.

    python benchmarks/peers.py all --medicaldiffusion DIR        everything, as Markdown tables
    python benchmarks/peers.py unet --medicaldiffusion DIR       one table

pip install "diffusers_byoc[benchmarks]" brings what PyPI has of the peers; DIR is a copy of MedicalDiffusion's
repository (git clone https://github.com/FirasGit/medicaldiffusion). What is missing is left out, and said so.

Networks that are compared take turns in one process, under one allocator; a time is the best of `--repeats`. Each
network runs in float32, as it comes, and in the fastest of the settings it supports without a change to its code:
float32 or bf16 (autocast, and for inference weights), contiguous or channels_last_3d. A ratio is a network's time over
that in the table's first row, which is this package's.
"""

import argparse
import copy
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

import torch
from diffusers import DDPMScheduler
from diffusers.utils import logging
from isolated import in_new_process, peak_gb
from peer_networks import (
    AUTOCAST,
    CODE_LENGTH,
    EQUAL,
    FLOAT32,
    INFERENCE_SETTINGS,
    NUM_CHANNELS,
    NUM_FEATURES,
    TRAINING_SETTINGS,
    AutoencoderPeer,
    Peers,
    Setting,
    UNetPeer,
    inference,
    unet_training_step,
)
from timing import convolution_peak, interleaved_best_ms, machine, matrix_peak
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from diffusers_byoc import BYOCPipeline, DualChannelUNet3D, MultiCodebookVQModel
from diffusers_byoc.models.attention import AxialAttention
from diffusers_byoc.models.normalization import InstanceNorm


# Room for the compiled kernels of all networks at once: a network alone has them all at hand, and one that takes turns
# with others should not compile its own anew each time. oneDNN reads this when it first compiles.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")


@dataclass(frozen=True)
class Sizes:
    """What is measured, and on what. The paper's: 2 x 64³, latents of 16 features on 16³."""

    edge: int
    batch: int
    repeats: int
    device: str

    def volumes(self, batch: int) -> Tensor:
        return torch.rand(batch, NUM_CHANNELS, *(self.edge,) * 3, device=self.device) * 2 - 1

    def latents(self, batch: int, num_features: int = NUM_FEATURES) -> Tensor:
        return torch.randn(batch, num_features, *(self.edge // 4,) * 3, device=self.device)


@dataclass(frozen=True)
class Case:
    """One network under one setting, ready to run."""

    name: str
    setting: Setting
    parameters: float  # millions
    gflop: float
    module: nn.Module
    run: Callable[[], object]

    @property
    def is_finite(self) -> bool:
        return all(torch.isfinite(parameter).all() for parameter in self.module.parameters())


MakeRun = Callable[[nn.Module, Setting], Callable[[], object]]


def parameter_count(module: nn.Module) -> float:
    """Millions of parameters, without those of a discriminator that is part of the module (MedicalDiffusion's)."""
    return sum(p.numel() for name, p in module.named_parameters() if "discriminator" not in name) / 1e6


def prepare(name: str, module: nn.Module, setting: Setting, make_run: MakeRun, gflop: float) -> Case:
    arranged = setting.apply(module)
    return Case(name, setting, parameter_count(module), gflop, arranged, make_run(arranged, setting))


def fastest_case(
    name: str, module: nn.Module, settings: Iterable[Setting], make_run: MakeRun, gflop: float
) -> tuple[Case, list[str]]:
    """The case with the fastest setting, by a quick look, and why other settings cannot be used."""
    times, refused = {}, []
    for setting in settings:
        try:
            case = prepare(name, module, setting, make_run, gflop)
            ms = interleaved_best_ms({name: case.run}, repetitions=1)[name]
        except (RuntimeError, NotImplementedError, ValueError, TypeError):
            refused.append(f"{setting.name} (an error)")
            continue
        if case.is_finite:
            times[setting] = ms
        else:
            refused.append(f"{setting.name} (weights that are not finite after two steps)")
    return prepare(name, module, min(times, key=times.get), make_run, gflop), refused


def count_gflop(module: nn.Module, make_run: MakeRun) -> float:
    """Multiplications and additions of one run, in 10⁹, as torch counts them."""
    run = make_run(copy.deepcopy(module), FLOAT32)
    run()
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 1e9


def compare(
    title: str,
    networks: Iterable[tuple[str, nn.Module, MakeRun]],
    settings: tuple[Setting, ...],
    sizes: Sizes,
    peak: Callable[[torch.dtype], float],
) -> None:
    """One table: every network in its fastest setting and in float32, as it comes; the first is this package's."""
    cases, notes = [], []
    for name, module, make_run in networks:
        module = module.to(sizes.device)
        gflop = count_gflop(module, make_run)
        case, refused = fastest_case(name, module, settings, make_run, gflop)
        cases.append(case)
        if case.setting != FLOAT32:
            cases.append(prepare(name, module, FLOAT32, make_run, gflop))
        if refused:
            notes.append(f"{name} cannot be used in: {', '.join(refused)}.")
    times = interleaved_best_ms({str(i): case.run for i, case in enumerate(cases)}, sizes.repeats)
    print(f"\n| {title} | parameters, M | fastest in | ms | ratio | GFLOP | of the convolution peak |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for i, case in enumerate(cases):
        ms = times[str(i)]
        share = case.gflop / ms * 1e3 / peak(case.setting.dtype)
        numbers = f"{ms:.1f} | {ms / times['0']:.2f} | {case.gflop:.1f} | {share:.0%}"
        print(f"| {case.name} | {case.parameters:.1f} | {case.setting.name} | {numbers} |")
    notes += [
        f"{case.name} had weights that are not finite after these steps." for case in cases if not case.is_finite
    ]
    print("".join(f"\n{note}\n" for note in notes), end="", flush=True)


def peaks(sizes: Sizes) -> dict[bool, Callable[[torch.dtype], float]]:
    """Measures and prints the machine's speeds; gives the convolution's, by whether gradients are included."""
    dtypes = (torch.float32, torch.bfloat16)
    forward, both = ({d: convolution_peak(d, sizes.device, backward) for d in dtypes} for backward in (False, True))
    print("\n| machine, GFLOP/s | float32 | bf16 |\n| --- | --- | --- |")
    products = [matrix_peak(d, sizes.device) for d in dtypes]
    print(f"| matrix product, 2048³ | {products[0]:.0f} | {products[1]:.0f} |")
    for name, speeds in (("forward", forward), ("forward and both gradients", both)):
        speeds = [speeds[d] for d in dtypes]
        print(f"| 3x3x3 convolution, 64 features, 16³, batch 8, {name} | {speeds[0]:.0f} | {speeds[1]:.0f} |")
    return {False: forward.__getitem__, True: both.__getitem__}


def benchmark_unets(peers: Peers, sizes: Sizes) -> None:
    peak = peaks(sizes)

    def denoise(peer: UNetPeer) -> MakeRun:
        def make_run(module: nn.Module, setting: Setting) -> Callable[[], object]:
            sample = setting.cast(sizes.latents(sizes.batch))
            timesteps = torch.randint(1000, (sizes.batch,), device=sizes.device)
            return inference(lambda: peer.predict(module.eval(), sample, timesteps), setting, sizes.device)

        return make_run

    def train(peer: UNetPeer, batch: int) -> MakeRun:
        def make_run(module: nn.Module, setting: Setting) -> Callable[[], object]:
            sample = setting.cast(sizes.latents(batch))
            timesteps = torch.randint(1000, (batch,), device=sizes.device)
            return unet_training_step(peer.predict, module.train(), sample, timesteps, setting)

        return make_run

    for group, members in groupby(peers.unets(), key=lambda peer: peer.group):
        members = list(members)
        networks = [(peer.name, peer.build(), denoise(peer)) for peer in members]
        title = f"U-Net, denoising step, batch {sizes.batch}, {group}"
        compare(title, networks, INFERENCE_SETTINGS, sizes, peak[False])
        for batch in sorted({2, sizes.batch}):
            networks = [
                (name, module, train(peer, batch)) for (name, module, _), peer in zip(networks, members, strict=True)
            ]
            compare(f"U-Net, training step, batch {batch}, {group}", networks, TRAINING_SETTINGS, sizes, peak[True])


def benchmark_autoencoders(peers: Peers, sizes: Sizes) -> None:
    peak = peaks(sizes)

    def encode(peer: AutoencoderPeer) -> MakeRun:
        def make_run(module: nn.Module, setting: Setting) -> Callable[[], object]:
            volumes = setting.cast(sizes.volumes(2))
            return inference(lambda: peer.encode(module.eval(), volumes), setting, sizes.device)

        return make_run

    def decode(peer: AutoencoderPeer) -> MakeRun:
        def make_run(module: nn.Module, setting: Setting) -> Callable[[], object]:
            with torch.no_grad(), setting.autocast(sizes.device):
                latents = peer.encode(module.eval(), setting.cast(sizes.volumes(2)))
            return inference(lambda: peer.decode(module.eval(), latents), setting, sizes.device)

        return make_run

    def train(peer: AutoencoderPeer) -> MakeRun:
        return lambda module, setting: peer.training_step(module, setting.cast(sizes.volumes(2)), setting)

    for group, members in groupby(peers.autoencoders(), key=lambda peer: peer.group):
        members = [(peer, peer.build()) for peer in members]
        for title, job, settings in (
            ("encode", encode, INFERENCE_SETTINGS),
            ("decode", decode, INFERENCE_SETTINGS),
            ("training step, all losses", train, TRAINING_SETTINGS),
        ):
            networks = [(peer.name, module, job(peer)) for peer, module in members]
            title = f"autoencoder, {title}, batch 2, {group}"
            compare(title, networks, settings, sizes, peak[settings is TRAINING_SETTINGS])
        print("\n".join(["", *(f"- {peer.name} has these losses: {peer.losses}." for peer, _ in members)]))


def benchmark_quantizers(peers: Peers, sizes: Sizes) -> None:
    latents = sizes.latents(8, CODE_LENGTH)
    num_vectors = latents.numel() // CODE_LENGTH
    runs: dict[str, Callable[[], object]] = {}
    for peer in peers.quantizers():
        for training, call in ((False, peer.quantize), (True, peer.quantize_and_update)):
            module = peer.build().to(sizes.device).train(training)
            runs[f"{peer.name}{training}"] = inference(partial(call, module, latents), FLOAT32, sizes.device)
    times = interleaved_best_ms(runs, max(sizes.repeats, 10))
    names = [name.removesuffix("True") for name in runs if name.endswith("True")]
    print(f"\n| nearest of 1024 codes, {num_vectors:,} x 16, float32 | ms | ratio | with EMA update, ms | ratio |")
    print("| --- | --- | --- | --- | --- |")
    for name in names:
        without, updating = times[f"{name}False"], times[f"{name}True"]
        ratios = (without / times[f"{names[0]}False"], updating / times[f"{names[0]}True"])
        print(f"| {name} | {without:.1f} | {ratios[0]:.1f} | {updating:.1f} | {ratios[1]:.1f} |")


def memory_case(kind: str, index: int, setting: Setting, checkpointing: bool, directory, sizes: Sizes):
    """(GB before, peak GB, seconds of the second training step) of one network, for a process of its own."""
    peers = Peers(directory)
    peer = list(peers.unets() if kind == "U-Net" else peers.autoencoders())[index]
    module = peer.build().to(sizes.device)
    before = peak_gb(sizes.device)
    if checkpointing:
        peer.checkpoint(module)
    if isinstance(peer, UNetPeer):
        timesteps = torch.randint(1000, (2,), device=sizes.device)
        step = unet_training_step(peer.predict, module.train(), sizes.latents(2), timesteps, setting)
    else:
        step = peer.training_step(module, sizes.volumes(2), setting)
    try:
        ms = interleaved_best_ms({"": step}, repetitions=1)[""]
    except (RuntimeError, NotImplementedError):
        return None
    return before, peak_gb(sizes.device), ms / 1e3


def benchmark_memory(peers: Peers, sizes: Sizes, directory: Path | None) -> None:
    print("\n| training step, batch 2 | arithmetic | gradient checkpointing | network alone, GB | peak, GB | s |")
    print("| --- | --- | --- | --- | --- | --- |")
    for kind, members in (("U-Net", list(peers.unets())), ("autoencoder", list(peers.autoencoders()))):
        for index, peer in enumerate(members):
            if peer.name in [member.name for member in members[:index]]:  # MedicalDiffusion's U-Net is in both groups
                continue
            for setting in (FLOAT32, AUTOCAST):
                for checkpointing in (False, True) if peer.checkpoint else (False,):
                    arguments = (kind, index, setting, checkpointing, directory, sizes)
                    measured = in_new_process(memory_case, *arguments)
                    numbers = "{:.2f} | {:.2f} | {:.2f}".format(*measured) if measured else "| raises an error |"
                    used = "yes" if checkpointing else "no" if peer.checkpoint else "not offered"
                    print(f"| {peer.name} | {setting.name} | {used} | {numbers} |", flush=True)


def benchmark_sampling(peers: Peers, sizes: Sizes, num_steps: int) -> None:
    """Noise to volumes. The peers' loops repeat one step, so a few are timed and multiplied."""
    autoencoders = {peer.name.split()[0]: peer for peer in peers.autoencoders() if peer.group == EQUAL}
    rows = []
    for peer in peers.unets():
        if peer.group != EQUAL:
            continue
        library = peer.name.split()[0]
        unet, decoder = peer.build().to(sizes.device).eval(), autoencoders.get(library)
        if library.startswith("DualChannel"):
            for dtype in (torch.float32, torch.bfloat16):
                pipeline = byoc_pipeline(unet, sizes).to(dtype=dtype)
                run = partial(pipeline, 8, num_inference_steps=num_steps, output_type="pt")
                seconds = interleaved_best_ms({"": run}, sizes.repeats)[""] / 1e3
                rows.append(("BYOCPipeline, equal parameters", str(dtype)[6:], num_steps, seconds, "whole"))
            continue
        vqvae = decoder.build().to(sizes.device).eval()
        latents = sizes.latents(8)
        timesteps = torch.full((8,), 500, device=sizes.device)
        if library == "MedicalDiffusion":
            total, step = 1000, peers.medicaldiffusion.ancestral_step(unet, latents)
        else:
            total, step = num_steps, partial(peer.predict, unet, latents, timesteps)
        for setting in (FLOAT32, AUTOCAST):

            def decode(decoder=decoder, vqvae=vqvae):
                decoder.decode(vqvae, sizes.latents(8, CODE_LENGTH))

            try:
                times = interleaved_best_ms(
                    {
                        "step": inference(step, setting, sizes.device),
                        "decode": inference(decode, setting, sizes.device),
                    },
                    sizes.repeats,
                )
            except (RuntimeError, NotImplementedError):
                continue
            seconds = (total * times["step"] + times["decode"]) / 1e3
            note = f"{total} x best of {sizes.repeats} steps, and decoding"
            rows.append((f"{library}, equal parameters", setting.name, total, seconds, note))
    print("\n| 8 samples, noise to volumes | arithmetic | steps | s | ratio | measured |")
    print("| --- | --- | --- | --- | --- | --- |")
    ours = min(seconds for name, _, _, seconds, _ in rows if name.startswith("BYOC"))
    for name, arithmetic, steps, seconds, note in rows:
        print(f"| {name} | {arithmetic} | {steps} | {seconds:.2f} | {seconds / ours:.1f} | {note} |", flush=True)


def byoc_pipeline(unet: DualChannelUNet3D, sizes: Sizes) -> BYOCPipeline:
    vqvae = MultiCodebookVQModel(block_out_channels=(32, 32, 64), layers_per_block=(0, 2))
    scheduler = DDPMScheduler(
        beta_schedule="squaredcos_cap_v2",
        clip_sample=False,
        timestep_spacing="leading",
        prediction_type="v_prediction",
    )
    pipeline = BYOCPipeline(vqvae, copy.deepcopy(unet), scheduler).to(sizes.device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def benchmark_epochs(peers: Peers, sizes: Sizes, num_volumes: int) -> None:
    """Each stage once over `num_volumes`, at batch 2, encoding included (which this package does but once)."""
    print(f"\n| one epoch, {num_volumes} volumes, batch 2, {EQUAL} | arithmetic | autoencoder, s | diffusion, s |")
    print("| --- | --- | --- | --- |")
    unets = {peer.name.split()[0]: peer for peer in peers.unets() if peer.group == EQUAL}
    byoc_unet = next(iter(unets.values()))
    for autoencoder in (peer for peer in peers.autoencoders() if peer.group == EQUAL):
        library = autoencoder.name.split()[0]
        for setting in (FLOAT32, AUTOCAST):
            try:
                *seconds, is_finite = epoch(autoencoder, unets.get(library, byoc_unet), setting, sizes, num_volumes)
            except (RuntimeError, NotImplementedError):
                continue
            numbers = f"{seconds[0]:.1f} | {seconds[1]:.1f}{'' if is_finite else ', weights not finite'}"
            print(f"| {library} | {setting.name} | {numbers} |", flush=True)


def epoch(autoencoder: AutoencoderPeer, unet: UNetPeer, setting: Setting, sizes: Sizes, num_volumes: int):
    """Seconds of one epoch of each stage, and whether the U-Net's weights are finite then."""
    volumes = sizes.volumes(2)
    vqvae, denoiser = autoencoder.build().to(sizes.device), unet.build().to(sizes.device).train()
    step = autoencoder.training_step(vqvae, volumes, setting)
    start = time.perf_counter()
    for _ in range(num_volumes // 2):
        step()
    autoencoder_seconds = time.perf_counter() - start

    vqvae.eval()
    encode = inference(lambda: autoencoder.encode(vqvae, volumes), setting, sizes.device)
    timesteps = torch.randint(1000, (2,), device=sizes.device)
    step = unet_training_step(unet.predict, denoiser, sizes.latents(2), timesteps, setting)
    start = time.perf_counter()
    for _ in range(num_volumes // 2):
        encode()
        step()
    diffusion_seconds = time.perf_counter() - start
    return autoencoder_seconds, diffusion_seconds, all(torch.isfinite(p).all() for p in denoiser.parameters())


@torch.no_grad()
def benchmark_numerics(peers: Peers, sizes: Sizes) -> None:
    """How far each arithmetic takes this package's networks, with random weights, from their float64 output."""
    unet = next(iter(peers.unets())).build().to(sizes.device).eval()
    vqvae = next(iter(peers.autoencoders())).build().to(sizes.device).eval()
    timesteps = torch.tensor([10, 900], device=sizes.device)
    jobs: dict[str, tuple[nn.Module, Tensor, Callable[[nn.Module, Tensor], Tensor]]] = {
        "U-Net, prediction": (unet, sizes.latents(2), lambda m, x: m(x, timesteps, return_dict=False)[0]),
        "autoencoder, encode": (vqvae, sizes.volumes(2), lambda m, x: m.encode(x, return_dict=False)[0]),
        "autoencoder, decode": (vqvae, sizes.latents(2), lambda m, x: m.decode(x, return_dict=False)[0]),
    }
    settings = (FLOAT32, AUTOCAST, Setting("bf16 weights", weights=torch.bfloat16))
    print("\n| relative error against float64 | " + " | ".join(setting.name for setting in settings) + " |")
    print("| --- " * (1 + len(settings)) + "|")
    for name, (module, inputs, run) in jobs.items():
        exact, errors = run(copy.deepcopy(module).double(), inputs.double()), []
        for setting in settings:
            with setting.autocast(sizes.device):
                output = run(setting.apply(module), setting.cast(inputs))
            errors.append(f"{((output - exact).norm() / exact.norm()).item():.1e}")
        print(f"| {name} | {' | '.join(errors)} |", flush=True)


LAYERS = {"convolution": nn.Conv3d, "instance norm": InstanceNorm, "attention": AxialAttention, "SiLU": nn.SiLU}
OPERATORS = {  # by the beginning or end of torch's operator names; the first that fits counts
    "convolution, gradients": ("convolution_backward",),
    "convolution, forward": ("convolution",),
    "matrix products": ("addmm", "::mm", "bmm", "attention_backward", "attention"),
    "copies and concatenation": ("copy_", "::cat", "::fill_", "::zero_"),
}


def benchmark_breakdown(peers: Peers, sizes: Sizes) -> None:
    """Where this package's U-Nets spend a denoising step, by layer, and a training step, by operator."""
    peak = peaks(sizes)[False](torch.bfloat16)
    for peer in peers.unets():
        if not peer.name.startswith("DualChannel"):
            continue
        unet = peer.build().to(sizes.device)
        sample = sizes.latents(sizes.batch).bfloat16()
        timesteps = torch.randint(1000, (sizes.batch,), device=sizes.device)
        module = copy.deepcopy(unet).bfloat16().eval()
        denoise = inference(partial(peer.predict, module, sample, timesteps), FLOAT32, sizes.device)
        total = interleaved_best_ms({"": denoise}, sizes.repeats)[""]
        with FlopCounterMode(display=False) as counter:
            denoise()
        layers = {f"{type(module).__name__}.{name}" for name, m in module.named_modules() if isinstance(m, nn.Conv3d)}
        gflop = sum(sum(counts.values()) for name, counts in counter.get_flop_counts().items() if name in layers) / 1e9
        spent = layer_ms(module, denoise, sizes)
        spent["addition, concatenation, interpolation, time"] = max(0.0, total - sum(spent.values()))
        print(
            f"\n| {peer.name}, denoising step, batch {sizes.batch}, bf16 weights | ms | share |\n| --- | --- | --- |"
        )
        for kind, ms in spent.items():
            print(f"| {kind} | {ms:.1f} | {ms / total:.0%} |")
        speed = gflop / spent["convolution"] * 1e3
        print(f"\nIts convolutions alone: {gflop:.0f} GFLOP at {speed:.0f} GFLOP/s, {speed / peak:.0%} of the peak.")

        step = unet_training_step(peer.predict, unet.train(), sizes.latents(2), timesteps[:2], AUTOCAST)
        step()
        activities = [ProfilerActivity.CUDA if sizes.device == "cuda" else ProfilerActivity.CPU]
        with profile(activities=activities) as profiler:
            step()
        events = profiler.key_averages()
        times = dict.fromkeys([*OPERATORS, "norms, activations, additions", "optimizer"], 0.0)
        for event in events:
            own, whole = (
                (event.self_device_time_total, event.device_time_total)
                if sizes.device == "cuda"
                else (event.self_cpu_time_total, event.cpu_time_total)
            )
            fitting = (kind for kind, parts in OPERATORS.items() if any(part in event.key for part in parts))
            times[next(fitting, "norms, activations, additions")] += own / 1e3
            if event.key.startswith("Optimizer.step"):  # its operators are elementwise, and counted there too
                times["optimizer"] += whole / 1e3
        times["norms, activations, additions"] -= times["optimizer"]
        print(f"\n| {peer.name}, training step, batch 2, bf16 autocast, profiled | ms | share |\n| --- | --- | --- |")
        for kind, ms in times.items():
            print(f"| {kind} | {ms:.1f} | {ms / sum(times.values()):.0%} |")


def layer_ms(module: nn.Module, run: Callable[[], object], sizes: Sizes) -> dict[str, float]:
    """Milliseconds that `run` spends in each kind of `LAYERS`, the least of several runs."""
    running: dict[nn.Module, float] = {}
    spent: dict[str, float] = {}

    def now() -> float:
        if sizes.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def start(layer: nn.Module, _) -> None:
        running[layer] = now()

    def stop(kind: str, layer: nn.Module, _, __) -> None:
        spent[kind] += (now() - running.pop(layer)) * 1e3

    handles = []
    for layer in module.modules():
        kind = next((kind for kind, layer_class in LAYERS.items() if isinstance(layer, layer_class)), None)
        if kind is not None:
            handles.append(layer.register_forward_pre_hook(start))
            handles.append(layer.register_forward_hook(partial(stop, kind)))
    rounds = []
    for _ in range(sizes.repeats):
        spent = dict.fromkeys(LAYERS, 0.0)
        run()
        rounds.append(spent)
    for handle in handles:
        handle.remove()
    return {kind: min(times[kind] for times in rounds) for kind in LAYERS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = ("unet", "autoencoder", "quantizer", "memory", "sampling", "epoch", "breakdown", "numerics")
    add = parser.add_argument
    add("table", nargs="?", choices=[*tables, "all"], default="all")
    add("--medicaldiffusion", type=Path, metavar="DIR", help="copy of MedicalDiffusion's repository")
    add("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=int, default=2, help="of the CPU")
    add("--repeats", type=int, default=5, help="turns that each network takes; the best counts")
    add("--batch", type=int, default=8, help="of the denoising step")
    add("--edge", type=int, default=64, help="of the volumes, voxels; the latents' is a quarter")
    add("--num_inference_steps", type=int, default=15, help="ours, the demo's, and MONAI's; MedicalDiffusion's: 1000")
    add("--epoch_volumes", type=int, default=16)
    args = parser.parse_args()

    logging.set_verbosity_error()  # it warns of every cast to bf16
    torch.set_num_threads(args.threads)
    sizes = Sizes(args.edge, args.batch, args.repeats, args.device)
    peers = Peers(args.medicaldiffusion)
    print(f"{machine(args.device)}; {NUM_CHANNELS} x {args.edge}³; the best of {args.repeats}")
    print("\n".join(["", *peers.missing]) if peers.missing else "")
    if args.table in ("memory", "all"):
        benchmark_memory(peers, sizes, args.medicaldiffusion)
    if args.table in ("unet", "all"):
        benchmark_unets(peers, sizes)
    if args.table in ("autoencoder", "all"):
        benchmark_autoencoders(peers, sizes)
    if args.table in ("quantizer", "all"):
        benchmark_quantizers(peers, sizes)
    if args.table in ("sampling", "all"):
        benchmark_sampling(peers, sizes, args.num_inference_steps)
    if args.table in ("epoch", "all"):
        benchmark_epochs(peers, sizes, args.epoch_volumes)
    if args.table in ("breakdown", "all"):
        benchmark_breakdown(peers, sizes)
    if args.table in ("numerics", "all"):
        benchmark_numerics(peers, sizes)


if __name__ == "__main__":
    main()
