"""examples/search.py on a tiny run: every kind of query is answered, and by the vectors' own cosine."""

import dataclasses
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import soundfile

from mmmodel import configs, embed, train
from mmmodel.data import synthetic

EXAMPLE = Path(__file__).parents[2] / "examples" / "search.py"


@pytest.fixture(scope="module")
def search():
    spec = importlib.util.spec_from_file_location("search_example", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def vectors(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMMODEL_CACHE", str(folder / "cache"))
        shards = synthetic.prepare(folder / "shards", samples=40, seed=0)
        train.pretrain(dataclasses.replace(configs.tiny(), data=str(shards), steps=2), folder / "run")
        embed.write(folder / "vectors.parquet", folder / "run")
    return folder


def test_text_finds_pictures_in_the_order_of_their_cosine(search, vectors, capsys):
    arguments = ["--from", str(vectors / "run"), "--vectors", str(vectors / "vectors.parquet"), "--top", "3"]
    best = search.main([*arguments, "--text", "a red circle"])
    assert len(best) == 3
    assert capsys.readouterr().out.splitlines()[0].endswith(best[0][0])
    keys, points = search.pictures(vectors / "vectors.parquet")
    query = embed.embed_one(embed.Embedder(vectors / "run"), text="a red circle")
    scores = dict(zip(keys, points @ query, strict=True))
    assert best[0][1] == pytest.approx(max(scores.values()), abs=1e-6)
    assert [score for _, score in best] == sorted((score for _, score in best), reverse=True)


def test_a_recording_finds_pictures(search, vectors, tmp_path):
    rng = np.random.default_rng(0)
    soundfile.write(tmp_path / "question.wav", rng.normal(0, 0.1, 8000).astype(np.float32), 16_000)
    arguments = ["--from", str(vectors / "run"), "--vectors", str(vectors / "vectors.parquet")]
    assert len(search.main([*arguments, "--speech", str(tmp_path / "question.wav")])) == 5


def test_a_search_for_nothing_is_refused(search, vectors):
    with pytest.raises(SystemExit, match="either --text or --speech"):
        search.main(["--from", str(vectors / "run"), "--vectors", str(vectors / "vectors.parquet")])
