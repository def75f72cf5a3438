"""The file of figures."""

import pytest

from mmmodel import metrics


@pytest.mark.parametrize(
    "spoilt",
    [
        b'{"step": 2, "loss": 0.',
        b'{"step": 2, "l\xffss": 1}',
        b'{"st\xffep": 2}',
        b"\x00\x00",
        b"7",
        b"null",
        b'{"loss": 1}',
    ],
)
def test_lines_are_read_up_to_the_first_that_is_spoilt(tmp_path, spoilt):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 2}\n' + spoilt + b'\n{"step": 3, "loss": 1}\n')
    assert metrics.read(path) == [{"step": 1, "loss": 2}]
    metrics.MetricsFile(path, from_step=1).close()
    assert metrics.read(path) == [{"step": 1, "loss": 2}]
