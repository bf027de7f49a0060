import os
import signal

from diffusers_byoc.training import Termination


def test_sigterm_is_noticed_once_asked_for(accelerator):
    before = signal.getsignal(signal.SIGTERM)
    termination = Termination()
    assert not termination.requested(accelerator)
    os.kill(os.getpid(), signal.SIGTERM)
    assert termination.requested(accelerator)
    termination.close()
    assert signal.getsignal(signal.SIGTERM) is before
