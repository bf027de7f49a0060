import os


os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_XET", "1")

import pytest  # noqa: E402
import torch  # noqa: E402
from accelerate.state import AcceleratorState, GradientState  # noqa: E402

from hub_server import HubServer  # noqa: E402


torch.set_num_threads(1)  # tiny models: more threads wait for each other, hundredfold on a busy machine


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same random state, whichever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def fresh_state():
    """accelerate's initial state and the threads, which trainings in this process change; called, it resets again."""

    def reset():
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    threads = torch.get_num_threads()
    reset()
    yield reset
    reset()
    torch.set_num_threads(threads)


@pytest.fixture
def hub(tmp_path_factory):
    """A local Hub; see `hub_server`."""
    server = HubServer(tmp_path_factory.mktemp("hub"))
    yield server
    server.close()
