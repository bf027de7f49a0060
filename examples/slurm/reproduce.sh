#!/bin/bash
# Table 1 or Figure 6 on a SLURM cluster: an array of jobs for each kind, one kind after the other, then the table.
#
#   bash examples/slurm/reproduce.sh table1 --preset paper --train_data_dir my_cells --output_dir outputs/paper
#   SBATCH="--partition gpu --gres gpu:1 --time 48:00:00" bash examples/slurm/reproduce.sh figure6 …
#
# From the repository's folder, in the environment that the jobs shall have. What a job gets beside is in SBATCH. A job
# that its time limit ends has saved before; call this again, and it goes on: what is done is not submitted.

set -euo pipefail

study=$1
shift
command="${PYTHON:-python} examples/reproduce_$study.py $(printf '%q ' "$@")"
options="${SBATCH:---gres gpu:1 --cpus-per-task 8 --time 48:00:00}"
listing=$(eval "$command --list_jobs")
if changed=$(grep -E '^ *[0-9]+ +[a-z]+ +changed ' <<<"$listing"); then
  printf 'Expected an --output_dir of the same arguments, got others in\n%s\nGive another one.\n' "$changed" >&2
  exit 1
fi

after=()
for kind in tune train evaluate; do
  numbers=$(awk -v kind="$kind" '$2 == kind && $3 != "done" { print $1 }' <<<"$listing" | paste -sd, -)
  [ -n "$numbers" ] || continue
  # shellcheck disable=SC2086  # the options are several words
  id=$(sbatch --parsable --job-name "$study-$kind" --array "$numbers" --signal B:TERM@120 --output "$study-%A-%a.log" \
    ${after[@]+"${after[@]}"} $options --wrap "exec $command --job \$SLURM_ARRAY_TASK_ID")
  echo "$kind: jobs $numbers, as $id"
  after=(--dependency "afterany:${id%%;*}")
done
# what failed is missing in the table, which says so; otherwise nothing is left to run
# shellcheck disable=SC2086
sbatch --parsable --job-name "$study" ${after[@]+"${after[@]}"} $options --output "$study-%j.log" --time 1:00:00 \
  --wrap "exec $command --write_only" | sed "s/^/$study: /"
