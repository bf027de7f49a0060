import os
import signal

import pytest

from diffusers_byoc.training import Termination


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noticed_once_asked_for(number, accelerator):
    before = signal.getsignal(number)
    termination = Termination()
    assert not termination.requested(accelerator)
    os.kill(os.getpid(), number)
    assert termination.requested(accelerator)
    termination.close()
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_does_not_wait():
    before = signal.getsignal(signal.SIGINT)
    Termination()
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
