"""What an evaluation may be told."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EvaluationSettings:
    """How cells are measured and compared.

    Args:
        channel_names: of the M channels of all volumes.
        voxel_size_um: (z, y, x) edge of a voxel in µm.
        cell_threshold: in [0, 1], the cell is brighter; None takes Otsu's.
        med3d: where the weights of Med3D are.
        num_neighbours: that span a neighbourhood, for precision and the like.
        classifier_cells: most cells of each kind that the 3D network learns from; 0 leaves it out.
        seed: of draws and classifiers.
        device: where networks run.
    """

    channel_names: tuple[str, ...] = ("cell", "nucleus")
    voxel_size_um: tuple[float, float, float] = (1.0, 1.0, 1.0)
    cell_threshold: float | None = None
    med3d: str = "TencentMedicalNet/MedicalNet-Resnet50"
    num_neighbours: int = 5
    classifier_cells: int = 100
    seed: int = 0
    device: str = "cpu"
