import math

import pytest

from diffusers_byoc.optional import optional


def test_a_missing_package_is_named_with_its_extra():
    assert optional("math", "data") is math
    with pytest.raises(ImportError, match=r"the package no_such_package, .*\[data,zarr\]"):
        optional("no_such_package.inside", "data,zarr")
