"""A table is the same in every format, appears whole or not at all, and floats keep their digits."""

import csv
import json

import numpy as np
import pytest
from pyarrow import parquet

from mmmodel import tables
from mmmodel.configs import ConfigError

COLUMNS = {"key": "text", "predicted": "names", "score_é": "number", "vector": "vector"}
ROWS = [
    ("a,b", ["x", 'y"'], 0.25, np.array([0.1, -2], np.float32)),
    ("línea\nnueva", [], np.float32(0.1), np.zeros(0, np.float32)),
]
PLAIN = [["a,b", ["x", 'y"'], 0.25, [0.1, -2.0]], ["línea\nnueva", [], 0.1, []]]


def read(path):
    if path.suffix == ".parquet":
        return [list(row.values()) for row in parquet.read_table(path).to_pylist()]
    if path.suffix == ".jsonl":
        return [list(json.loads(line).values()) for line in path.read_text("utf-8").splitlines()]
    with path.open(newline="", encoding="utf-8") as file:
        head, *rows = csv.reader(file)
    assert head == list(COLUMNS)
    return [[key, json.loads(names), float(score), json.loads(vector)] for key, names, score, vector in rows]


@pytest.mark.parametrize("suffix", tables.FORMATS)
@pytest.mark.parametrize("chunks", [[ROWS], [ROWS[:1], [], ROWS[1:]], []], ids=["one", "three", "none"])
def test_what_is_read_is_what_was_written(tmp_path, suffix, chunks):
    path = tmp_path / "made" / f"t{suffix}"
    expected = PLAIN if chunks else []
    assert tables.write(path, COLUMNS, chunks) == len(expected)
    for found, row in zip(read(path), expected, strict=True):
        assert found[:2] == row[:2]
        assert found[2] == pytest.approx(row[2], abs=1e-8)
        assert found[3] == (pytest.approx(row[3]) if suffix == ".parquet" else row[3])


@pytest.mark.parametrize("suffix", tables.FORMATS)
def test_what_breaks_off_leaves_the_old_file(tmp_path, suffix):
    (path := tmp_path / f"t{suffix}").write_text("old")

    def chunks():
        yield ROWS
        raise RuntimeError("a cable was pulled")

    with pytest.raises(RuntimeError, match="cable"):
        tables.write(path, COLUMNS, chunks())
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [(path.name, "old")]


def test_a_folder_in_a_tables_place_is_named_before_the_work(tmp_path):
    (tmp_path / "t.csv").mkdir()
    with pytest.raises(ConfigError, match=r"t\.csv is a folder, expected the name of a file to write"):
        tables.check(tmp_path / "t.csv")
