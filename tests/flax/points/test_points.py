"""Points read from files that the tests write: what comes in, and what is wrong with a file."""

import itertools
import sys

import numpy as np
import pytest

from flash_wtconv_jax.points import read

XYZ = np.array([[1.5, -2, 3], [4, 5, 6.25], [-7, 8, 9]])


def fails(path, match, error=ValueError, **options):
    """Reading is an error that names the file."""
    with pytest.raises(error, match=match) as raised:
        read(path, **options)
    assert str(path) in str(raised.value)


def assert_points(points, features, names):
    assert (points.coordinates.dtype, points.features.dtype) == (np.float64, np.float32)
    np.testing.assert_array_equal(points.coordinates, XYZ)
    np.testing.assert_array_equal(points.features, np.float32(features))
    assert points.names == tuple(names)


class TestScans:
    @pytest.mark.parametrize(
        "name, names", [("0.bin", ["intensity"]), ("0.pcd.BIN", ["intensity", "ring"])]
    )
    def test_rows_of_float32(self, tmp_path, name, names):
        features = np.arange(3 * len(names)).reshape(3, -1)
        np.hstack([XYZ, features]).astype("<f4").tofile(tmp_path / name)
        assert_points(read(tmp_path / name), features, names)

    def test_columns_of_another_scanner(self, tmp_path):
        path = tmp_path / "a.bin"
        np.hstack([np.ones((3, 1)), XYZ[:, ::-1]]).astype("<f4").tofile(path)
        assert_points(read(path, ["t", "z", "y", "x"]), np.ones((3, 1)), ["t"])
        fails(path, "48 bytes, which are no whole rows of 20: x, y, z, a, b", columns=[*"xyzab"])
        for columns in (["x", "y"], ["x", "y", "z", "Z"], "xyz"):
            with pytest.raises(ValueError, match="columns=.*x, y and z among them"):
                read(path, columns)

    def test_a_scan_that_is_cut_off_and_one_of_no_points(self, tmp_path):
        path = tmp_path / "a.bin"
        path.write_bytes(bytes(50))
        fails(path, "50 bytes, which are no whole rows of 16: x, y, z, intensity in float32")
        path.write_bytes(b"")
        assert read(path).features.shape == (0, 1)


PLY = {
    "char": "i1",
    "uint8": "u1",
    "short": "i2",
    "uint16": "u2",
    "int": "i4",
    "uint32": "u4",
    "float": "f4",
    "float64": "f8",
}
ORDERS = {"ascii": "", "binary_little_endian": "<", "binary_big_endian": ">"}


def ply(path, order, elements):
    """Writes elements: a count and, by type and name, a column of each property or lists."""
    lines, body = ["ply", f"format {order} 1.0", "comment \N{GREEK SMALL LETTER ALPHA}"], []
    for name, (count, properties) in elements.items():
        lines.append(f"element {name} {count}")
        lines += [f"property {declared}" for declared in properties]
        for row in range(count):
            cells = []
            for declared, column in properties.items():
                *kinds, _ = declared.split()
                if kinds[0] == "list":
                    cells.append((PLY[kinds[1]], len(column[row])))
                    cells += [(PLY[kinds[2]], each) for each in column[row]]
                else:
                    cells.append((PLY[kinds[0]], column[row]))
            if order == "ascii":
                body.append(" ".join(f"{value}" for _, value in cells).encode() + b"\n")
            else:
                body += [np.array(value, ORDERS[order] + kind).tobytes() for kind, value in cells]
    header = "\n".join([*lines, "end_header", ""]).encode()
    path.write_bytes(header + b"".join(body))
    return path


def vertices(kinds="float", **columns):
    axes = {f"{kinds} {axis}": column for axis, column in zip("xyz", XYZ.T, strict=True)}
    return {"vertex": (3, {**axes, **columns})}


FACES = {"face": (2, {"list uint8 int vertex_indices": [[0, 1, 2], [2, 1, 0, 1]]})}


class TestPly:
    @pytest.mark.parametrize("order", ORDERS)
    def test_every_type_comes_in_and_faces_stay_out(self, tmp_path, order):
        columns = {f"{kind} {kind}_": np.array([1, 2, 100]) for kind in PLY}
        path = ply(tmp_path / "a.ply", order, vertices("float64", **columns) | FACES)
        features = np.repeat([[1], [2], [100]], len(PLY), axis=1)
        assert_points(read(path), features, [f"{kind}_" for kind in PLY])

    @pytest.mark.parametrize("order", ORDERS)
    def test_what_stands_in_front_and_lists_of_vertices_are_passed_over(self, tmp_path, order):
        lists = {"list uint8 short neighbours": [[], [1], [5, 6, 7]], "uint8 red": [0, 128, 255]}
        cameras = {"camera": (2, {"float64 focus": [1.5, 2.5], "uint8 id": [1, 2]})}
        path = ply(tmp_path / "a.ply", order, cameras | FACES | vertices(**lists))
        assert_points(read(path), [[0], [128], [255]], ["red"])

    @pytest.mark.parametrize("order", ORDERS)
    def test_a_file_that_is_cut_off_anywhere(self, tmp_path, order):
        whole = ply(tmp_path / "a.ply", order, FACES | vertices()).read_bytes()
        path = tmp_path / "b.ply"
        header = whole.index(b"end_header\n")
        for size in (0, 2, 30, header, header + 11, header + 15, len(whole) - 14, len(whole) - 8):
            path.write_bytes(whole[:size])
            fails(path, "cut off|no PLY file|numbers are in its header|columns changed")

    @pytest.mark.parametrize("order", ORDERS)
    @pytest.mark.parametrize("count", [2, 4, 10**15])
    def test_a_header_that_lies(self, tmp_path, order, count):
        path = ply(tmp_path / "a.ply", order, vertices())
        content = path.read_bytes().replace(b"vertex 3", b"vertex %d" % count)
        path.write_bytes(content)
        fails(path, "goes on behind the 2 vertices" if count == 2 else f"the {count} rows of its")

    def test_no_vertices(self, tmp_path):
        path = ply(tmp_path / "a.ply", "ascii", FACES)
        fails(path, "expected an element vertex, its header has face")
        path = ply(path, "ascii", {"vertex": (3, {"float x": XYZ[:, 0], "float z": XYZ[:, 2]})})
        fails(path, "has no column y, but x, z")
        for order in ORDERS:
            empty = {f"float {name}": [] for name in (*"xyz", "nx")}
            points = read(ply(path, order, {"vertex": (0, empty)}))
            assert (points.features.shape, points.names) == ((0, 1), ("nx",))

    @pytest.mark.parametrize(
        "line, match",
        [
            ("format ascii 2.0", "its header has the line 'format ascii 2.0'"),
            ("element vertex -3", "the line 'element vertex -3'"),
            ("property half x", "the line 'property half x'"),
            ("property list float", "the line 'property list float'"),
            ("end_header", "no line 'format', one of ascii, binary_little_endian"),
        ],
    )
    def test_a_header_that_nobody_can_read(self, tmp_path, line, match):
        path = tmp_path / "a.ply"
        path.write_text(f"ply\n{line}\nend_header\n")
        fails(path, match)

    @pytest.mark.parametrize("row", ["1 2", "1 2 3 4", "1 2 x", ""])
    def test_a_line_that_does_not_fit(self, tmp_path, row):
        path = ply(tmp_path / "a.ply", "ascii", vertices())
        path.write_text(path.read_text().replace("4.0 5.0 6.25", row))
        fails(path, "columns changed from 3|could not convert string 'x'|behind it")

    def test_a_property_that_is_there_twice(self, tmp_path):
        path = ply(tmp_path / "a.ply", "ascii", vertices())
        path.write_text(path.read_text().replace("float y", "float x"))
        fails(path, "a property twice")


class TestArrays:
    def test_an_array_of_rows(self, tmp_path):
        path = tmp_path / "a.npy"
        np.save(path, np.hstack([XYZ, XYZ]))
        assert_points(read(path), XYZ, ["c3", "c4", "c5"])
        points = read(path, ["nx", "ny", "nz", "x", "y", "z"])
        assert_points(points, XYZ, ["nx", "ny", "nz"])
        fails(path, "expected 4 names|expected 6 names", columns=["x", "y", "z", "w"])

    def test_fields_have_names(self, tmp_path):
        fields = np.dtype([("Z", "f8"), ("Y", "f8"), ("X", "f8"), ("rgb", "u1", 3), ("id", "U4")])
        table = np.zeros(3, fields)
        table["X"], table["Y"], table["Z"] = XYZ.T
        table["rgb"] = [[1, 2, 255]]
        np.save(tmp_path / "a.npy", table)
        names = ["rgb_0", "rgb_1", "rgb_2"]
        assert_points(read(tmp_path / "a.npy"), [[1, 2, 255]] * 3, names)
        fails(tmp_path / "a.npy", "names its columns itself", columns=["x", "y", "z"])

    def test_an_archive(self, tmp_path):
        path = tmp_path / "a.npz"
        np.savez_compressed(path, np.hstack([XYZ, np.ones((3, 1))]))
        assert_points(read(path), np.ones((3, 1)), ["c3"])
        about = {"pose": np.eye(4), "scene": np.array("room"), "time": np.array(3.0)}
        np.savez(path, normal=XYZ, Coord=XYZ, label=[True, False, True], **about)
        features = np.hstack([XYZ, [[1], [0], [1]]])
        assert_points(read(path), features, ["normal_0", "normal_1", "normal_2", "label"])
        np.savez(path, x=XYZ[:, 0], y=XYZ[:, 1], z=XYZ[:, 2], i=[1, 2, 3])
        assert_points(read(path), [[1], [2], [3]], ["i"])
        fails(path, "names its arrays itself", columns=["x", "y", "z"])

    @pytest.mark.parametrize(
        "arrays", [{}, {"a": XYZ, "b": XYZ}, {"xyz": XYZ, "pos": XYZ}, {"x": XYZ, "y": XYZ}]
    )
    def test_an_archive_without_coordinates_or_with_two(self, tmp_path, arrays):
        np.savez(tmp_path / "a.npz", **arrays)
        fails(tmp_path / "a.npz", "has the arrays .* expected one of them to be called coord")

    def test_arrays_that_hold_no_points(self, tmp_path):
        path = tmp_path / "a.npy"
        for array, match in (
            (np.zeros((4, 2)), r"expected an array \[n, 3 \+ C\], got shape \(4, 2\)"),
            (np.zeros(4), "expected numbers"),
            (np.full((4, 3), "a"), "expected numbers"),
            (np.full((4, 3), None), "pickle"),
        ):
            np.save(path, array)
            fails(path, match)
        path.write_bytes(b"")
        fails(path, "no array can be read from it")
        np.save(path, XYZ)
        content = path.read_bytes()
        for damaged in (
            content[:40],
            content[:-8],
            content.replace(b"(3, 3), ", b"(%d, 3), " % 10**15)[: len(content)],
        ):
            path.write_bytes(damaged)
            fails(path, "no array can be read from it")

    def test_archives_that_are_damaged_or_mixed_up(self, tmp_path):
        path = tmp_path / "a.npz"
        np.savez_compressed(path, xyz=np.random.default_rng(0).normal(size=(99, 3)))
        content = path.read_bytes()
        for damaged in (b"", content[:300], content[:200] + bytes(64) + content[264:]):
            path.write_bytes(damaged)
            fails(path, "no array can be read from it")
        np.save(tmp_path / "b.npy", XYZ)
        (tmp_path / "b.npy").rename(path)
        fails(path, "no array can be read from it")
        np.savez(tmp_path / "c.npz", XYZ)
        (tmp_path / "c.npz").rename(tmp_path / "c.npy")
        fails(tmp_path / "c.npy", "is an .npz file by its content")


class TestLas:
    @pytest.fixture
    def survey(self, tmp_path):
        """Writes a survey far from the origin, and returns its path by the extension."""
        laspy = pytest.importorskip("laspy")
        pytest.importorskip("lazrs")

        def write(kind):
            header = laspy.LasHeader(point_format=2, version="1.4")
            header.scales, header.offsets = np.full(3, 0.01), np.array([600_000, 5_000_000, 0])
            header.add_extra_dim(laspy.ExtraBytesParams("normal", "3f4"))
            points = laspy.LasData(header)
            points.xyz = XYZ + header.offsets
            points.classification, points.blue, points.normal = [2, 5, 6], [7, 8, 65535], XYZ
            points.write(tmp_path / f"a.{kind}")
            return tmp_path / f"a.{kind}"

        return write

    @pytest.mark.parametrize("kind", ["las", "laz"])
    def test_coordinates_are_scaled_and_dimensions_features(self, survey, kind):
        points = read(survey(kind))
        np.testing.assert_allclose(
            points.coordinates, XYZ + [600_000, 5_000_000, 0], rtol=0, atol=1e-6
        )
        columns = dict(zip(points.names, points.features.T, strict=True))
        assert columns["classification"].tolist() == [2, 5, 6]
        assert columns["blue"].tolist() == [7, 8, 65535]
        assert columns["normal_1"].tolist() == XYZ[:, 1].tolist()
        assert not {"X", "Y", "Z"} & set(points.names)

    @pytest.mark.parametrize("kind", ["las", "laz"])
    def test_a_file_that_is_cut_off(self, survey, kind):
        path = survey(kind)
        content = path.read_bytes()
        start = int.from_bytes(content[96:100], "little")
        # A row has 38 bytes: the last two whole rows are gone.
        for size in (0, 10, 100, 300, start, start + 38, len(content) - 1):
            path.write_bytes(content[:size])
            fails(path, "no points can be read from it|ends after . of the 3 points")

    def test_what_is_missing_is_named_with_its_extra(self, survey, tmp_path, monkeypatch):
        import laspy

        path = survey("laz")
        monkeypatch.setattr(laspy.LazBackend, "detect_available", classmethod(lambda cls: ()))
        fails(path, r"needs lazrs, .*pip install 'flash-wtconv\[las\]'", ModuleNotFoundError)

    def test_a_missing_laspy_is_named_with_its_extra(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "laspy", None)
        (tmp_path / "a.las").touch()
        message = r"needs laspy, .*pip install 'flash-wtconv\[las\]'"
        fails(tmp_path / "a.las", message, ModuleNotFoundError)


@pytest.mark.parametrize("kind", ["bin", "ply", "npy", "npz"])
def test_a_coordinate_that_is_not_finite_is_named_with_its_row(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    for bad, axis in itertools.product((np.nan, np.inf), range(3)):
        xyz = np.vstack([XYZ, XYZ[:1]])
        xyz[2:, axis] = bad
        if kind == "bin":
            np.hstack([xyz, xyz[:, :1]]).astype("<f4").tofile(path)
        elif kind == "ply":
            columns = {f"float {name}": xyz[:, i] for i, name in enumerate("xyz")}
            ply(path, "ascii", {"vertex": (4, columns)})
        else:
            np.save(path, xyz) if kind == "npy" else np.savez(path, xyz)
        fails(path, r"point 2 is \[.*(nan|inf).*expected finite coordinates; 2 of 4 points")


def test_a_feature_that_float32_has_no_number_for_is_infinite(tmp_path):
    np.save(tmp_path / "a.npy", np.array([[1, 2, 3, 1e300, np.nan]]))
    assert not np.isfinite(read(tmp_path / "a.npy").features).any()


def test_what_is_no_file_of_points(tmp_path):
    fails(tmp_path / "a.xyz", "ends with one of .bin, .las, .laz, .npy, .npz, .ply")
    fails(tmp_path / "a.bin", "there is no such file", FileNotFoundError)
    (tmp_path / "a.npy").mkdir()
    fails(tmp_path / "a.npy", "is a folder, expected a file", IsADirectoryError)
    ply(tmp_path / "a.ply", "ascii", vertices())
    fails(tmp_path / "a.ply", "names its columns itself", columns=["x", "y", "z"])
