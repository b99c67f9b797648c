"""The README against the program."""

import ast
import re
from dataclasses import fields
from pathlib import Path

from conftest import ROOT, run

import quest_7_2 as quest

README = (ROOT / "README.md").read_text()


def test_every_option_is_in_the_readme_with_its_default():
    table = dict(re.findall(r"^\| `(--[a-z0-9-]+)` \| (.+?) \|", README, re.MULTILINE))
    assert list(table) == [quest.flag_of(option.name) for option in fields(quest.Config)]
    for option in fields(quest.Config):
        shown = table[quest.flag_of(option.name)]
        if option.default is False:
            assert shown == "off"
        elif option.default is None:
            assert "`" not in shown
        else:
            assert shown == f"`{option.default}`"


def test_help_lists_every_option_and_makes_nothing(tmp_path):
    done = run("--help", cwd=tmp_path, env={"COLUMNS": "200"})
    assert done.returncode == 0 and list(tmp_path.iterdir()) == []
    text = " ".join(done.stdout.split("options:")[1].split())
    for option in fields(quest.Config):
        about = text.split(f" {quest.flag_of(option.name)} ", 1)[-1]
        about = about.split(" --", 1)[0] if not isinstance(option.default, bool) else about
        assert option.metadata["help"] in about
        assert option.default is None or f"(default: {option.default})" in about


def test_the_packages_are_the_seven_pinned():
    lines = (ROOT / "requirements.txt").read_text().split()
    names = {line.split("==")[0] for line in lines if re.fullmatch(r"[a-z]+==[0-9.]+", line)}
    assert names == {
        "torch", "torchvision", "diffusers", "transformers", "peft", "datasets", "tqdm"
    }  # fmt: skip
    assert len(lines) == 7


def test_python_in_the_readme_is_python():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        ast.parse(block)


def test_the_names_the_spec_fixes_are_in_the_code():
    code = Path(quest.__file__).read_text()
    for name in [
        "apply_transforms",
        "dataset",
        "train_dataloader",
        "train_prompt",
        "prompt_ids",
        "LoraConfig",
        "get_peft_model",
        "AdamW",
        "DDPMScheduler",
        "tqdm",
    ]:
        assert re.search(rf"\b{name}\b", code), name


def test_the_top_level_is_as_agreed():
    tracked = {"quest_7_2.py", "requirements.txt", "README.md", "tests", ".gitignore", ".ci"}
    ignored = set((ROOT / ".gitignore").read_text().replace("/", "").split()) | {".git"}
    assert {path.name for path in ROOT.iterdir()} - ignored == tracked
