from pathlib import Path

import pytest

from diffusers_byoc.data.formats.metadata import read_metadata
from diffusers_byoc.data.microscope.pairing import find_files, pair_labels, pair_rows


def paths(*names):
    return [Path("/d") / name for name in names]


@pytest.mark.parametrize(
    ("image", "label"),
    [
        ("A1.ome.tif", "A1.tif"),
        ("A1.ome.tif", "A1_masks.tif"),
        ("A1.ome.tif", "A1.ome_cp_masks.tif"),
        ("A1.czi", "mask_A1.tiff"),
        ("A1.nd2", "A1_cell_labels.ome.zarr"),
        ("my_cell.lif", "my_cell_masks.tif"),
        ("Zelle ä.TIF", "Zelle a\u0308-Seg.tif"),  # the same letter, as Windows and as macOS write it
        ("A1.tif", "plate7_A1_v2.tif"),
        ("A1.2.tif", "A1.2_masks.tif"),
        ("(A1).tif", "x (A1) y.tif"),
    ],
)
def test_names_that_agree(image, label):
    (image, other), (label, unlike) = paths(image, "A10.ome.tif"), paths(label, "A10_masks.tif")
    assert pair_labels([image, other], [unlike, label]) == {image: label, other: unlike}


def test_the_order_of_names_does_not_count():
    # sorted, the second image would get the first label image
    images, labels = paths("A1.tif", "A10.tif", "A1b.tif"), paths("A10_masks.tif", "A1_masks.tif", "A1b_masks.tif")
    pairs = pair_labels(images, labels)
    assert [pairs[image].name for image in images] == ["A1_masks.tif", "A10_masks.tif", "A1b_masks.tif"]


def test_the_longest_name_counts():
    images = paths("A1.tif", "A1_x2.tif")
    labels = paths("run_A1_v1.tif", "run_A1_x2_v1.tif")
    assert pair_labels(images, labels) == dict(zip(images, labels, strict=True))


def test_folders_tell_equal_names_apart():
    images = paths("raw/p1/A1.tif", "raw/p2/A1.tif", "p3/raw/A1.tif")
    labels = paths("seg/p2/A1.tif", "p3/seg/A1.tif", "seg/p1/A1.tif")
    pairs = pair_labels(images, labels)
    assert [pairs[image] for image in images] == [labels[2], labels[0], labels[1]]


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (["A1.tif", "A2.tif"], ["A1_masks.tif"], "A2.tif: has no labels"),
        (["A1.tif"], ["A1_masks.tif", "A2_masks.tif"], "A2_masks.tif: belongs to no image"),
        (["A1.tif"], ["A1_masks.tif", "A1_labels.tif"], "A1.tif: has .*A1_masks.tif and .*A1_labels.tif"),
        (["p1/A1.tif", "p2/A1.tif"], ["m/A1.tif", "n/A1.tif"], "m/A1.tif: belongs to .*p1/A1.tif or .*p2/A1.tif"),
        (["A1.tif"], ["A10_masks.tif"], "A10_masks.tif: belongs to no image"),
        ([f"{i}.tif" for i in range(50)], ["x.tif"], "and 31 more"),
    ],
)
def test_what_does_not_pair_is_named(images, labels, message):
    with pytest.raises(ValueError, match=message):
        pair_labels(paths(*images), paths(*labels))


def test_folders_whose_names_look_like_patterns(tmp_path):
    folder = tmp_path / "[2024] screen *" / "day?"
    folder.mkdir(parents=True)
    (folder / "A[1].tif").touch()
    assert find_files([str(folder / "*.tif")]) == find_files([str(folder / "A[1].tif")]) == [folder / "A[1].tif"]
    (folder / "B.tif").symlink_to("gone.tif")
    with pytest.raises(FileNotFoundError, match=r"Expected a file, got .*B\.tif, a link to none"):
        find_files([str(folder / "*.tif")])


def test_patterns(tmp_path, monkeypatch):
    for name in ("a b/x[1].tif", "a b/y.tif", "a b/c/z.tif", "._x.tif", "a b/z.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    assert find_files(["**/*.tif"]) == [Path("a b/c/z.tif"), Path("a b/x[1].tif"), Path("a b/y.tif")]
    assert find_files(["a b/x[1].tif", "a b/x[[]1].tif"]) == [Path("a b/x[1].tif")]  # literally, and as a pattern
    assert find_files(["a b/y.tif", "a b/?.tif"]) == [Path("a b/y.tif")]
    with pytest.raises(FileNotFoundError, match="Expected files of the name"):
        find_files(["**/*.tif", "*.czi"])


@pytest.mark.parametrize("name", ["A1.tif", "p1/A1.tif", "p1\\A1.tif", "/d/p1/A1.tif", "./p1//A1.tif"])
def test_a_row_names_its_image_by_the_end_of_its_path(name):
    images = paths("p1/A1.tif", "p1/BA1.tif")
    rows = [(2, {"file_name": name, "plate": "x"}), (3, {"file_name": "BA1.tif", "plate": "y"})]
    pairs = pair_rows(images, rows, "t.csv")
    assert [pairs[image]["plate"] for image in images] == ["x", "y"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["A1.tif"], "no row for /d/p2/B.tif"),
        (["A1.tif", "B.tif", "C.tif"], "line 4: 'C.tif' names no image"),
        (["A1.tif", "B.tif", "p2/B.tif"], "line 4: 'p2/B.tif' stands already"),
    ],
)
def test_rows_that_do_not_pair_are_named(names, message):
    rows = [(line, {"file_name": name}) for line, name in enumerate(names, 2)]
    with pytest.raises(ValueError, match=message):
        pair_rows(paths("p1/A1.tif", "p2/B.tif"), rows, "t.csv")


def test_an_ambiguous_row_is_refused():
    with pytest.raises(ValueError, match="p1/A1.tif and .*p2/A1.tif"):
        pair_rows(paths("p1/A1.tif", "p2/A1.tif"), [(2, {"file_name": "A1.tif"})], "t.csv")


def test_a_table_as_excel_writes_it(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes('\ufefffile_name,drug,note\r\n"ä 1.tif",X,"a, b"\r\nb.tif,Y,\r\n'.encode())
    assert read_metadata(path, "drug") == [
        (2, {"file_name": "ä 1.tif", "drug": "X", "note": "a, b"}),
        (3, {"file_name": "b.tif", "drug": "Y", "note": ""}),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"file_name;drug\na;b\n", "Expected the columns file_name"),
        (b"file_name,label\na,b\n", "Expected the columns file_name, drug"),
        (b"file_name,drug,drug\na,b,c\n", "got 'drug' again"),
        (b"file_name,drug\n", "a row for each"),
        (b"file_name,drug\na,b,c\n", "Expected 2 columns in .*, line 2"),
        (b"file_name,drug\n ,b\n", "Expected a file_name in .*, line 2"),
        (b"file_name,drug\n\xff,b\n", "UTF-8"),
        (b'file_name,drug\n"a,b\n', "Expected a readable CSV"),
    ],
)
def test_a_faulty_table_is_refused(tmp_path, text, message):
    (tmp_path / "t.csv").write_bytes(text)
    with pytest.raises(ValueError, match=message):
        read_metadata(tmp_path / "t.csv", "drug")


def test_fields_of_plates_belong_to_the_plate_of_their_name_and_folder():
    fields = [
        f"{folder}/{plate}.ome.zarr/A/{well}/0" for folder in ("d1", "d2") for plate in ("p", "q") for well in "12"
    ]
    images = [Path(field) for field in fields]
    within = {image: image / "labels" / "cells" for image in images}
    assert pair_labels(images, list(within.values())) == within
    others = {image: Path(str(image).replace(".ome.zarr", "_labels.ome.zarr")) for image in images}
    assert pair_labels(images, list(others.values())) == others
    files = {Path("p.ome.zarr/A/1/0"): Path("p_A_1_0_masks.tif"), Path("p.ome.zarr/A/1/10"): Path("A_1_10.tif")}
    assert pair_labels(list(files), list(files.values())) == files
    with pytest.raises(ValueError, match=r"p.ome.zarr/A/1/0: has no labels"):
        pair_labels(images[:1], [])


def test_a_row_names_a_field_or_a_well():
    images = [Path(f"s/p.ome.zarr/{field}") for field in ("A/1/0", "A/1/1", "A/11/0", "B/1/0")]
    rows = [(2, {"file_name": "A/1"}), (3, {"file_name": "A/11/0"}), (4, {"file_name": "p.ome.zarr/B/1"})]
    assert pair_rows(images, rows, "t.csv") == dict(
        zip(images, [rows[0][1], rows[0][1], rows[1][1], rows[2][1]], strict=True)
    )
    with pytest.raises(ValueError, match="stands already"):
        pair_rows(images, [*rows, (5, {"file_name": "A/1/1"})], "t.csv")
    with pytest.raises(ValueError, match="line 5: 'p.ome.zarr' names no image"):
        pair_rows(images, [*rows, (5, {"file_name": "p.ome.zarr"})], "t.csv")
