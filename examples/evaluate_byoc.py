"""Judge generated cells: the paper's metrics, and what a biologist asks, with real and obviously bad cells beside.

python examples/evaluate_byoc.py --pretrained DIR_OR_REPO --train_data_dir my_cells --output_dir results
python examples/evaluate_byoc.py --generated_dir their_cells --train_data_dir my_cells --features morphology

The steps are in `src/diffusers_byoc/commands/evaluate_run.py`, the metrics in `evaluation/metric_table.py`.
"""

from diffusers_byoc.commands.evaluate import main


if __name__ == "__main__":
    main()
