"""How many cells fit into memory at a time, learned from those that were made."""

import os
import sys

import torch

from ..optional import optional


MOST_CELLS = {"cpu": 8, "cuda": 64}  # at a time; more are hardly faster
UNMEASURED = 8  # where nobody says how much memory there is
SHARE = 0.8  # of what is free, as cells may take more than the ones before them


class MemoryMeter:
    """What this process takes on a device, from now on.

    Args:
        device: to generate on. Of CPUs and CUDA's GPUs memory is measured.
    """

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            torch.cuda.init()  # which a pipeline that is offloaded may not have done yet
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
        elif device.type == "cpu":
            self.before = optional("psutil", "data").Process().memory_info().rss

    def cells_that_fit(self, num_cells: int) -> int:
        """Cells to make at a time: as many as fit, at least one.

        Args:
            num_cells: that were made at a time since the meter began.
        """
        if self.device.type not in MOST_CELLS:
            return UNMEASURED
        each = max(1, self._peak() - self.before) / num_cells
        return max(1, min(MOST_CELLS[self.device.type], int(SHARE * self._free() / each)))

    def _peak(self) -> int:
        """Bytes; of a CPU since the process began, which is no less than the cells took."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if sys.platform == "win32":
            return optional("psutil", "data").Process().memory_info().peak_wset
        import resource  # which Windows has not

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    def _free(self) -> int:
        """Bytes that this process may take: of a GPU with those that it keeps, of the CPU's a fair part."""
        if self.device.type == "cuda":
            kept = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
            return torch.cuda.mem_get_info(self.device)[0] + kept
        return optional("psutil", "data").virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
