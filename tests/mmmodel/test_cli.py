"""The command line: a user's mistake is one line and a non-zero exit, not a traceback."""

import json

import pytest

from mmmodel import cli, configs


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretrain", "--set", "bogus=3"], "config: no field 'bogus', expected one of model"),
        # the first --set counts too, in every command that has the flag
        (["pretrain", "--set", "bogus=3", "--set", "steps=1", "seed=1"], "config: no field 'bogus'"),
        (["complexity", "--set", "bogus=3", "--set", "steps=1"], "config: no field 'bogus'"),
        (["ablate", "objectives", "--set", "bogus=3", "--set", "steps=1"], "config: no field 'bogus'"),
        (["pretrain", "--set", "steps=many"], "config: steps is 'many', expected a whole number"),
        (
            ["pretrain", "--preset", "tiny", "--set", "schedule=wsd", "--out", "other"],
            "other holds a run with other",
        ),
        (["evaluate", "--run", "missing"], "evaluate: missing holds no model.safetensors"),
        (["plot", "--run", "missing"], "plot: missing holds no steps to draw"),
        (["data", "stamps", "--cache", "cache", "--tree", "missing"], r"stamps: no captions \(\*.txt\) under missing"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_a_mistake_is_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps(configs.to_dict(configs.tiny())))
    (tmp_path / "other" / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(SystemExit, match=message):
        cli.main(arguments)
