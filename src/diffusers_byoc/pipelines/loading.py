"""What went wrong when a pipeline was loaded from the Hub, in one line."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.errors import HfHubHTTPError


@contextmanager
def hub_errors(pretrained: str | os.PathLike) -> Iterator[None]:
    """Say what the Hub answered, which diffusers leaves to the traceback.

    Args:
        pretrained: what is loaded: a folder or a name on the Hub.

    Raises:
        OSError: if the Hub refuses, or the connection breaks off. Other errors pass as they are.
    """
    try:
        yield
    except Exception as error:
        if Path(pretrained).is_dir():
            raise
        reasons = _chain(error)
        if answer := next((reason for reason in reasons if isinstance(reason, HfHubHTTPError)), None):
            status = answer.response.status_code
            raise OSError(
                f"Expected a pipeline in a folder, or on the Hub, got {pretrained}, for which it answers {status}"
                f" ({type(answer).__name__}). Check name and revision; for a private repository log in with"
                " `hf auth login`, or set HF_TOKEN."
            ) from error
        # of the client's HTTP library, which no class of huggingface_hub stands for
        if broken := next((reason for reason in reasons if type(reason).__module__.startswith("httpx")), None):
            raise OSError(
                f"Expected the whole of {pretrained} from the Hub, got a connection that broke off"
                f" ({type(broken).__name__}: {broken}). Run it again: what has come is kept."
            ) from error
        raise


def _chain(error: BaseException | None) -> list[BaseException]:
    """An error, what caused it, what caused that, and so on."""
    found = []
    while error is not None:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found
