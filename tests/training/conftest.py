import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState


@pytest.fixture
def accelerator(tmp_path):
    def reset():
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    reset()
    yield Accelerator(cpu=True, project_dir=str(tmp_path))
    reset()
