"""The examples of the drop-ins for torch and flash_attn and snippets of docs/drop_in.md, as a user would run them."""

import re
import runpy

import pytest
from file_map import ROOT

# The sections after these load pretrained models; tests/compat and the other examples cover their drop-ins.
PAGE = (ROOT / "docs" / "drop_in.md").read_text().split("## Hugging Face")[0]
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("name", ["torch_padding", "flash_attn_on_cpu"])
def test_example_runs_and_holds(name, capsys):
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    assert "same " in capsys.readouterr().out


@pytest.mark.parametrize("code", SNIPPETS, ids=lambda code: re.search(r"mmkernels\.\w+(\.\w+)?", code).group())
def test_snippets_of_the_page_run(code):
    exec(compile(code, "docs/drop_in.md", "exec"), {})


def test_each_face_has_a_snippet():
    for name in ("torch_sdpa", "torch_varlen", "flash_attn", "replace_attention"):
        assert any(name in code for code in SNIPPETS)
