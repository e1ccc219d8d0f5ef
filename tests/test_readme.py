"""README and docs: their size, commands, pictures, links, file tree and examples in Python."""

import importlib
import re
import shlex
from itertools import chain

from running.config import override

import numpy as np
import pytest
from helpers import ROOT, lines, make_dataset, map_tile, run, tile_of, tiny

import infer
import train

README = ROOT / "README.md"
FOLDERS = ("docs", "benchmarks", "experiments")
PAGES = [README, *(page for folder in FOLDERS for page in sorted(ROOT.glob(f"{folder}/*.md")))]
ROOMS = ("running", "maps", "evaluation", "training", "trained", "preparation", "explorer")


def code_blocks(language, pages=PAGES):
    """The content of all code blocks of a language, from some pages."""
    pattern = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
    blocks = chain(*(pattern.findall(page.read_text()) for page in pages))
    return [content for name, content in blocks if name == language]


def prose(page):
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page):
    """The names that links give to the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands():
    """(script, [key=value, ..]) of every command in the code blocks, and in the Slurm script."""
    text = "\n".join([*code_blocks("bash"), (ROOT / "docs/slurm.sh").read_text()])
    for line in text.replace("\\\n", " ").replace("&&", "\n").splitlines():
        if found := re.search(r"(\w+)\.py(.*)", line):
            words = shlex.split(found[2], comments=True)
            yield found[1], [word for word in words if "=" in word]


def file_tree():
    """The Python files in the README's tree, as paths from the root."""
    (tree,) = [block for block in code_blocks("", [README]) if "train.py " in block]
    files, folder = set(), ""
    for line in tree.splitlines():
        name = line.split()[0] if line.strip() else ""
        if name.endswith("/"):
            folder = name
        elif name.endswith(".py"):
            files.add(folder + name if line.startswith(" ") else name)
    return files


def test_the_readme_is_one_page_and_has_the_first_command():
    assert len(README.read_bytes()) <= 10_000
    first = "pip install -r requirements.txt && python train.py epochs=2"
    assert first in README.read_text().splitlines()


def test_the_commands_have_keys_that_exist(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "experiments")
    found = list(commands())
    assert {"train", "train_classification", "infer", "create_false_color_map"} <= {
        script for script, _ in found
    }
    for script, arguments in found:
        module = importlib.import_module(script)
        override(getattr(module, "run_config", {}), arguments)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_pictures_linked_files_and_headings_are_there(page):
    text = prose(page)
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    for link in links:
        if link.startswith("https://"):
            continue
        path, _, heading = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not heading or heading in anchors(target), link


def test_the_file_tree_has_every_module_and_script():
    patterns = ("*.py", *(f"{room}/*.py" for room in ROOMS))
    files = {str(file.relative_to(ROOT)) for pattern in patterns for file in ROOT.glob(pattern)}
    assert file_tree() == {file for file in files if not file.endswith("__init__.py")}


def test_the_tests_that_keep_promises_are_there():
    names = set(re.findall(r"`(test_\w+\.py)`", (ROOT / "docs/promises.md").read_text()))
    assert len(names) >= 10
    assert names <= {file.name for file in ROOT.glob("tests/*.py")}


def test_the_page_on_python_runs_and_gives_what_a_map_has(workplace, tmp_path, monkeypatch, capsys):
    """From top to bottom, like a notebook."""
    for name, target in {
        "checkpoints/landcover": workplace / "classifier",
        "data/simulated/processed/MGRS-SIM1": tile_of(workplace),
    }.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).symlink_to(target)
    monkeypatch.chdir(tmp_path)
    names, cells = {}, code_blocks("python", [ROOT / "docs/python.md"])
    assert len(cells) == 4
    for cell in cells:
        exec(cell, names)
    assert "wanted reflectance x 10000 (scale=10000 multiplies" in capsys.readouterr().out
    (folder,) = map_tile(workplace, tmp_path / "map")
    mapped, codes = (
        np.load(folder / f"{name}_map.npy") for name in ("representation", "classification")
    )
    np.testing.assert_allclose(names["embeddings"], mapped, atol=1e-5)
    assert (names["codes"] == codes).all()


CONFIG_KEYS = {"LOSSES": "loss", "BACKBONES": "backbone", "AUGMENTATIONS": "augment"}


@pytest.mark.parametrize(
    "code", [code for code in code_blocks("python") if code.startswith("# ")], ids=lambda c: c[2:12]
)
def test_an_extension_of_the_docs_trains_and_maps(tmp_path, monkeypatch, code):
    """The example is run as the end of the file that its first line names."""
    module = importlib.import_module(code.splitlines()[0].removeprefix("# ").removesuffix(".py"))
    ((registry, name),) = re.findall(r'^([A-Z]+)\["(\w+)"\] = ', code, flags=re.MULTILINE)
    monkeypatch.setitem(vars(module)[registry], name, None)  # taken out again after the test
    exec(code, dict(vars(module)))
    make_dataset(tmp_path)
    for folder in ("one", "two"):  # all that is random must come from the seed
        chosen = {CONFIG_KEYS[registry]: name}
        train.main(tiny(tmp_path, tmp_path / folder, max_steps=3, **chosen))
    first, again = (lines(tmp_path / folder) for folder in ("one", "two"))
    assert all(np.isfinite(line["loss"]) for line in first[1:])
    assert [line["loss"] for line in first[1:]] == [line["loss"] for line in again[1:]]
    checkpoint, output_dir = tmp_path / "one/last.pt", tmp_path / "map"
    run(infer, checkpoint_path=checkpoint, tile_path=tile_of(tmp_path), output_dir=output_dir)
    assert np.isfinite(np.load(output_dir / "representation_map.npy")).any()
