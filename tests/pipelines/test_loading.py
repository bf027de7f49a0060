"""What went wrong on the way from the Hub; `tests/commands/test_publish.py` has the Hub's own answers."""

import httpx
import pytest

from diffusers_byoc.pipelines.loading import hub_errors


def test_a_connection_that_breaks_off_is_said_whatever_wraps_it():
    with pytest.raises(OSError, match=r"Expected the whole of org/name .*\(ReadError: cable\).*what has come is kept"):
        with hub_errors("org/name"):
            try:
                raise httpx.ReadError("cable")
            except httpx.ReadError as error:
                raise ValueError("a wrapper") from error


def test_other_errors_and_those_of_folders_pass(tmp_path):
    for name, error in (("org/name", ValueError("other")), (tmp_path, httpx.ReadError("of no interest"))):
        with pytest.raises(type(error), match=str(error)):
            with hub_errors(name):
                raise error
