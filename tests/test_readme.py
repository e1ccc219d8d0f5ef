"""The README's commands and pictures."""

import importlib
import re

from helpers import ROOT

from runtime import override

README = (ROOT / "README.md").read_text()


def readme_commands():
    """(script, [key=value, ..]) of every command in the README's code blocks."""
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    words = " ".join(blocks).replace("\\\n", " ").replace("&&", "\n")
    for line in words.splitlines():
        if found := re.search(r"(\w+)\.py(.*)", line):
            yield found[1], [word for word in found[2].split() if "=" in word]


def test_the_commands_of_the_readme_have_keys_that_exist():
    commands = list(readme_commands())
    assert {"train", "train_classification", "infer", "create_false_color_map"} <= {
        script for script, _ in commands
    }
    for script, arguments in commands:
        override(importlib.import_module(script).run_config, arguments)


def test_the_pictures_of_the_readme_are_there():
    for path in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / path).exists(), path
