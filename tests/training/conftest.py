import pytest
from accelerate import Accelerator


@pytest.fixture
def accelerator(fresh_state, tmp_path):
    return Accelerator(cpu=True, project_dir=str(tmp_path))
