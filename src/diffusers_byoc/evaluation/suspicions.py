"""What may be wrong with generated volumes as such, before any metric."""

import numpy as np


def suspicions(generated: np.ndarray, real: np.ndarray, are_files: bool) -> list[str]:
    """What a reader of the table must know, a line each.

    Args:
        generated: (N, K) averaged voxels of generated cells.
        real: (N', K) the same of real ones.
        are_files: the volumes were made elsewhere, and read from files.
    """
    found = []
    if num_blank := int((np.ptp(generated, axis=1) == 0).sum()):
        found.append(f"{num_blank} of the {len(generated)} generated volumes are blank.")
    if num_copies := len(generated) - len(np.unique(generated, axis=0)):
        found.append(f"{num_copies} of the {len(generated)} generated volumes are copies of another generated one.")
    if generated.max() < real.max() / 4:
        hint = " Integers are read over their type's range; rescale files that do not fill it." if are_files else ""
        found.append(
            f"The generated volumes are dark: up to {generated.max():.2g}, where real ones reach {real.max():.2g}."
            f"{hint}"
        )
    return found
