from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dino_adapters.contracts import DataError, UnknownNameError
from dino_adapters.data.metadata import Classes, Metadata, Numbers, entangled, read_metadata
from dino_adapters.data.metadata import uncertainty as told
from dino_adapters.runtime.console import Notices

KEYS = ("a/1.png", "a/2.png", "b/1.png", "b/2.png", "b/3.png")
TABLE = """path,scanner,age
a/1.png,Zeta,40
a/2.png,Alpha,
b/1.png,,25.5
b/2.png,Alpha,60
gone.png,Beta,ninety
"""


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def read(tmp_path: Path, text: str, *, notices: Notices | None = None, **columns):
    return read_metadata(
        write(tmp_path / "m.csv", text), tmp_path, KEYS, columns, notices=notices or Notices()
    )


def classes(*codes: int) -> Classes:
    names = tuple(f"class {number}" for number in range(max(codes, default=-1) + 1))
    return Classes(names, np.asarray(codes, dtype=np.int64))


class TestRead:
    def test_classes_and_numbers_are_aligned_with_the_keys(self, tmp_path: Path):
        found = read(tmp_path, TABLE, scanner="classes", age="numbers")
        scanner, age = found.column("scanner"), found.column("age")
        assert isinstance(scanner, Classes)
        assert isinstance(age, Numbers)
        # Beta belongs to an image that is not here, and is no class.
        assert scanner.names == ("Alpha", "Zeta")
        assert scanner.codes.dtype == np.int64
        assert scanner.codes.tolist() == [1, 0, -1, 0, -1]
        assert (age.low, age.high) == (25.5, 60.0)
        assert age.values.dtype == np.float32
        expected = [(40 - 25.5) / 34.5, math.nan, 0.0, 1.0, math.nan]
        np.testing.assert_allclose(age.values, expected, rtol=1e-6)
        assert found.keys == KEYS
        assert found.classes() == {"scanner": 2}

    def test_gaps_are_counted_once(self, tmp_path: Path):
        notices = Notices()
        read(tmp_path, TABLE, scanner="classes", age="numbers", notices=notices)
        assert notices.summary() == (
            "1 of 5 rows of the metadata table have no image here (1×): gone.png",
            "2 of 5 images have no value in the column 'age' (2×): a/2.png, …",
            "2 of 5 images have no value in the column 'scanner' (2×): b/1.png, …",
        )

    def test_only_columns_that_are_asked_for(self, tmp_path: Path):
        found = read(tmp_path, TABLE, age="numbers")
        assert set(found.columns) == {"age"}
        with pytest.raises(UnknownNameError, match=r"no metadata column 'ages'.*'age'"):
            found.column("ages")

    @pytest.mark.parametrize(("place", "prefix"), [("m.csv", ""), ("lists/m.csv", "../")])
    def test_paths_from_the_root_or_from_the_table(self, tmp_path: Path, place, prefix):
        rows = "".join(f"{prefix}{key};{key[0]}\n" for key in KEYS)
        table = write(tmp_path / place, "path;side\n" + rows)
        found = read_metadata(table, tmp_path, KEYS, {"side": "classes"}).column("side")
        assert isinstance(found, Classes)
        assert found.codes.tolist() == [0, 0, 1, 1, 1]

    def test_rows_of_one_image_add_up(self, tmp_path: Path):
        text = "path,x\na/1.png,\na/1.png,p\na/1.png,p\na/2.png,q\nb/1.png,q\n"
        found = read(tmp_path, text, x="classes").column("x")
        assert isinstance(found, Classes)
        assert found.codes.tolist() == [0, 1, 1, -1, -1]

    def test_classes_that_read_like_missing_ones_are_noticed(self, tmp_path: Path):
        notices = Notices()
        text = "path,x\na/1.png,NA\na/2.png,q\nb/1.png,q\n"
        read(tmp_path, text, x="classes", notices=notices)
        assert "read like missing values; empty their cells (1×): NA" in notices.summary()[1]


class TestRefusals:
    @pytest.mark.parametrize(
        ("text", "kind", "said"),
        [
            ("path,y\na/1.png,1\n", "classes", r"m\.csv has no column 'x'\. Known: y\."),
            ("path,xx\na/1.png,1\n", "classes", r"no column 'x'\. Did you mean 'xx'\?"),
            ("path\na/1.png\n", "classes", "no column 'x'. It has none beside the path"),
            ("path,x\n", "classes", "a header and no rows"),
            ("path,x\nc/1.png,1\n", "classes", "No row of .* names an image below .*'c/1.png'"),
            ("path,x\na/1.png,\na/2.png, \n", "numbers", "No image has a value in column 'x'"),
            ("path,x\na/1.png,p\na/2.png,p\n", "classes", "All 2 images .* the same one"),
            ("path,x\na/1.png,7\na/2.png,7.0\n", "numbers", "All 2 images .* the same one"),
            ("path,x\na/1.png,p\na/2.png,q\n", "classes", "Every one of 2 images has a value of"),
            ("path,x\na/1.png,p\na/1.png,q\n", "classes", "Lines 2 and 3 give a/1.png different"),
        ],
    )
    def test_tables_that_tell_nothing(self, tmp_path: Path, text, kind, said):
        with pytest.raises(DataError, match=said):
            read(tmp_path, text, x=kind)

    @pytest.mark.parametrize("cell", ["Mrs Grey", "nan", "inf", "1_000", "3;5", "1e301"])
    def test_what_is_no_number_is_named_by_its_line(self, tmp_path: Path, cell):
        text = f"path,x\na/1.png,1\na/2.png,{cell}\nb/1.png,3\nb/2.png,{cell}\n"
        with pytest.raises(DataError, match=r"Line 3 holds no number.*\(2 of 4 cells") as caught:
            read(tmp_path, text, x="numbers")
        assert cell not in str(caught.value)

    def test_values_stay_out_of_messages(self, tmp_path: Path):
        for values in (["Mrs Grey", "Mrs Grey"], ["Mrs Grey", "Mr White"]):
            rows = "".join(f"{key},{value}\n" for key, value in zip(KEYS, values, strict=False))
            with pytest.raises(DataError) as caught:
                read(tmp_path, "path,x\n" + rows, x="classes")
            assert "Grey" not in str(caught.value)


@given(
    st.lists(
        st.none() | st.floats(-1e300, 1e300, allow_nan=False), min_size=2, max_size=len(KEYS)
    ).filter(lambda cells: len({cell for cell in cells if cell is not None}) > 1)
)
def test_numbers_are_scaled_for_any_range(tmp_path_factory, cells):
    tmp_path = tmp_path_factory.mktemp("numbers")
    rows = "".join(
        f"{key},{'' if cell is None else repr(cell)}\n"
        for key, cell in zip(KEYS, cells, strict=False)
    )
    found = read(tmp_path, "path,x\n" + rows, x="numbers").column("x")
    assert isinstance(found, Numbers)
    known = [cell for cell in cells if cell is not None]
    assert (found.low, found.high) == (min(known), max(known))
    for value, cell in zip(found.values, [*cells, *[None] * len(KEYS)], strict=False):
        if cell is None:
            assert math.isnan(value)
        else:
            assert 0.0 <= value <= 1.0
            expected = (cell - found.low) / (found.high - found.low)
            assert value == pytest.approx(expected, abs=1e-6)


def slow_uncertainty(y, x):
    """From the definition: 1 - H(Y|X) / H(Y), by counting."""
    pairs = [(a, b) for a, b in zip(y, x, strict=True) if a >= 0 and b >= 0]
    count = len(pairs)
    entropy = -sum(n / count * math.log(n / count) for n in Counter(a for a, _ in pairs).values())
    rest = 0.0
    for b, n in Counter(b for _, b in pairs).items():
        for m in Counter(a for a, other in pairs if other == b).values():
            rest -= m / count * math.log(m / n)
    return 0.0 if entropy == 0 else 1 - rest / entropy


codes = st.integers(-1, 4)


@given(st.lists(st.tuples(codes, codes), min_size=1, max_size=30))
def test_uncertainty_is_its_definition(pairs):
    y, x = zip(*pairs, strict=True)
    found = told(classes(*y), classes(*x))
    assert 0.0 <= found <= 1.0
    assert found == pytest.approx(slow_uncertainty(y, x), abs=1e-9)


def test_uncertainty_has_a_direction():
    maker, serial = classes(0, 0, 0, 0, 1, 1, 1, 1), classes(0, 0, 1, 1, 2, 2, 3, 3)
    assert told(maker, serial) == pytest.approx(1.0)
    assert told(serial, maker) == pytest.approx(0.5)
    assert told(classes(0, 0, 1, 1), classes(0, 1, 0, 1)) == pytest.approx(0.0)


def test_uncertainty_of_unrelated_columns_is_about_its_bias():
    draws, found = np.random.default_rng(0), []
    for _ in range(200):
        y, x = draws.integers(0, 4, 400), draws.integers(0, 6, 400)
        found.append(told(classes(*y), classes(*x)))
    assert np.mean(found) == pytest.approx(3 * 5 / (2 * 400 * math.log(4)), rel=0.15)


class TestEntangled:
    KEYS = tuple(str(number) for number in range(40))

    def metadata(self, **columns) -> Metadata:
        return Metadata(self.KEYS, columns)

    def test_a_repelled_column_that_tells_an_attracted_one(self):
        site = classes(*[number // 10 for number in range(40)])
        scanner = classes(*[number // 5 for number in range(40)])
        (said,) = entangled(
            self.metadata(site=site, scanner=scanner), {"site": "attract", "scanner": "repel"}
        )
        assert "'scanner' tells 100% of the attracted column 'site'" in said
        assert "which tells 67% of it" in said

    def test_either_direction_counts(self):
        site = classes(*[number // 5 for number in range(40)])
        scanner = classes(*[number // 20 for number in range(40)])
        (said,) = entangled(
            self.metadata(site=site, scanner=scanner), {"site": "attract", "scanner": "repel"}
        )
        assert "'scanner' tells 33% of the attracted column 'site', which tells 100%" in said

    def test_unrelated_columns_and_equal_effects_say_nothing(self):
        site = classes(*[number // 10 for number in range(40)])
        hour = classes(*[number % 10 // 5 for number in range(40)])
        pair = self.metadata(site=site, hour=hour)
        assert entangled(pair, {"site": "attract", "hour": "repel"}) == ()
        same = self.metadata(site=site, again=site)
        assert entangled(same, {"site": "attract", "again": "attract"}) == ()
        assert entangled(same, {"site": "repel", "again": "repel"}) == ()

    def test_numbers_are_compared_by_tenths(self):
        year = Numbers(np.linspace(0, 1, 40, dtype=np.float32), 1990, 2029)
        site = classes(*[number // 10 for number in range(40)])
        pair = self.metadata(year=year, site=site)
        assert len(entangled(pair, {"site": "attract", "year": "repel"})) == 1
        shuffled = np.random.default_rng(0).permutation(year.values)
        shuffled[:4] = np.nan
        pair = self.metadata(year=Numbers(shuffled, 1990, 2029), site=site)
        assert entangled(pair, {"site": "attract", "year": "repel"}) == ()
