"""Run the paper's comparisons on one's own cells, or on phantoms: train every model, judge it, write the table.

python examples/reproduce_table1.py --preset cpu                                   five models, three phenotypes
python examples/reproduce_figure6.py --preset paper --train_data_dir my_cells      the ablation of the codebooks

The same command goes on after an interruption, and does not repeat what is done. `--list_jobs` and `--job N` are for
clusters: examples/slurm/reproduce.sh. See docs/reproduction.md.
"""

import argparse
import dataclasses
import os
import signal
import sys

from .command_line import make_parser, one_line_errors
from .data_arguments import add_source_arguments, positive
from .reproduction.jobs import Jobs
from .reproduction.plan import FIGURE, MODELS, TABLE, Plan, read_plan
from .training_arguments import given_arguments


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments; `given` are those of the cells that the command line itself names."""
    parser = make_parser(__doc__, "byoc-reproduce")
    add = parser.add_argument
    add("study", choices=[TABLE, FIGURE])
    add("--preset", default="cpu", help="cpu, paper, or the path of a JSON file like them")
    add("--output_dir", default="outputs/reproduction", help="all runs, what they found, table and figure")
    add("--list_jobs", action="store_true", help="show number, kind, state and name of each job, and run none")
    add("--job", type=int, help="run this one alone")
    add("--write_only", action="store_true", help="write table or figure of what is done, and run none")
    add("--num_processes", type=positive, default=1, help="jobs at a time on this machine")
    add("--num_cpu_threads", type=positive, help="of each job (default: a fair share of all cores)")
    add("--models", nargs="+", choices=MODELS, help="of Table 1 (default: the preset's)")
    flag = {"action": argparse.BooleanOptionalAction}
    add("--tune", **flag, help="try three learning rates of each model for which the preset has not settled one")
    add("--train_minutes", type=float, help="of each training, in place of the preset's")
    add("--num_folds", type=positive, help="in place of the preset's")
    add("--train_each_fold", **flag, help="train a model without each fold, in place of one for all")
    add("--med3d", help="weights of Med3D (.pth, folder or Hub repository): compare by its features, too")
    add("--seed", type=int, default=0, help="of phantoms, trainings and generated cells")
    names = {action.dest for action in parser._actions}
    add_source_arguments(parser)
    args = parser.parse_args(argv)
    if args.study == FIGURE and args.models:
        parser.error("Expected no --models for figure6, whose rows are codebooks of BYOC, got some. Leave them out.")
    of_cells = {action.dest for action in parser._actions} - names - {"label"}  # which are the drugs
    args.given = {name: value for name, value in given_arguments(parser, argv).items() if name in of_cells}
    return args


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    with one_line_errors(name="byoc-reproduce"):
        reproduce(args, argv)


def reproduce(args: argparse.Namespace, argv: list[str]) -> None:
    """What the command does, as `parse_args` understood it; `argv` is for the processes that it starts."""
    plan = make_plan(args)
    jobs = Jobs(plan.jobs(args.study), args.output_dir)
    if args.list_jobs:
        print("\n".join(jobs.listing()))
        return
    if not args.write_only:
        check_med3d(jobs)
    if args.job is not None:
        jobs.run(args.job, args.num_cpu_threads)
        return
    jobs.check()
    failed = [] if args.write_only else run_all(args, argv, jobs)
    from .reproduction.results import write_results  # torch

    write_results(args.study, plan, jobs)
    if failed:
        raise SystemExit("\n".join(failed))


def check_med3d(jobs: Jobs) -> None:
    """Load the weights that evaluations will ask for: without them days of training would come before the error."""
    evaluation = next(job for job in jobs.jobs if job.kind == "evaluate").commands[0].parse(pretrained="run")
    if "med3d" in evaluation.features:
        from ..metrics import load_med3d  # an extra, which the other features do without

        load_med3d(evaluation.med3d)


def run_all(args: argparse.Namespace, argv: list[str], jobs: Jobs) -> list[str]:
    """`Jobs.run_all` by processes that are told `argv`."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the trainings are told to end
    command = [sys.executable, "-m", "diffusers_byoc.commands.reproduce", *argv]
    if args.num_cpu_threads is None and args.num_processes > 1:
        num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        command += ["--num_cpu_threads", str(max(1, num_cores // args.num_processes))]
    return jobs.run_all([*command, "--job"], args.num_processes)


def make_plan(args: argparse.Namespace) -> Plan:
    """The preset's plan, with what the command line says."""
    evaluation = {name: args.given[name] for name in ("num_phantoms",) if name in args.given}
    plan = read_plan(
        args.preset,
        cells=args.given,
        evaluation=evaluation,
        drugs=args.label,
        num_folds=args.num_folds,
        train_each_fold=args.train_each_fold,
        train_minutes=args.train_minutes,
        tune=args.tune,
        seed=args.seed,
    )
    changes = {}
    if args.models:
        if unknown := set(args.models) - set(plan.models):
            raise ValueError(
                f"Expected --models of the preset ({', '.join(plan.models)}), got {', '.join(sorted(unknown))}. Leave"
                " them out, or add them to a preset of your own."
            )
        changes["models"] = {name: plan.models[name] for name in MODELS if name in args.models}
    if args.med3d:
        features = ["med3d", *plan.evaluation.get("features", ("morphology", "texture"))]
        changes["evaluation"] = plan.evaluation | {"med3d": args.med3d, "features": list(dict.fromkeys(features))}
    return dataclasses.replace(plan, **changes)


if __name__ == "__main__":
    main()
