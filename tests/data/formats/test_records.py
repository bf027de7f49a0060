import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from diffusers_byoc.data.formats.records import decode_volume, encode_volume
from diffusers_byoc.data.formats.volume import Volume


volumes = st_numpy.arrays(
    st.sampled_from(["bool", "uint8", "int16", ">u2", "float16", "float32", ">f8"]),
    st_numpy.array_shapes(min_dims=4, max_dims=4, max_side=4),
)


@given(volumes)
def test_round_trip(data):
    decoded = decode_volume(encode_volume(Volume(data, (0.5, 0.1, 0.1), ("a",) * len(data))))
    np.testing.assert_array_equal(decoded.data, data)
    assert decoded.data.dtype == data.dtype.newbyteorder("=") and decoded.data.flags.writeable
    assert decoded.voxel_size_um == (0.5, 0.1, 0.1) and decoded.channel_names == ("a",) * len(data)


def test_unknown_size_and_names_stay_unknown():
    decoded = decode_volume(encode_volume(Volume(np.zeros((1, 2, 2, 2), np.uint8))))
    assert decoded.voxel_size_um is None and decoded.channel_names is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": [2, 4, 4]}, r"\(C, Z, Y, X\)"),
        ({"shape": [2, 4, 4, 5]}, "another number"),
        ({"shape": [2, 4, 4, 3]}, "another number"),
        ({"shape": [2, 4, 4, -4]}, r"\(C, Z, Y, X\)"),
        ({"shape": [2, 40000, 40000, 4000]}, "at most"),
        ({"dtype": "object"}, "dtype 'object'"),
        ({"dtype": "complex64"}, "dtype 'complex64'"),
        ({"dtype": "nonsense"}, "dtype 'nonsense'"),
        ({"volume": b"no zlib"}, "damaged"),
        ({"volume": zlib.compress(bytes(128))[:-3]}, "another number"),
        ({"volume": zlib.compress(bytes(10**8))}, "another number"),
    ],
)
def test_damage_is_refused(change, message):
    row = encode_volume(Volume(np.zeros((2, 4, 4, 4), np.uint8)))
    with pytest.raises(ValueError, match=message):
        decode_volume(row | change)


def test_a_missing_column_is_named():
    with pytest.raises(ValueError, match="shape"):
        decode_volume({"volume": b"", "dtype": "uint8"})
