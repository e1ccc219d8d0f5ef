"""README and docs: their commands, pictures, links and examples in Python."""

import importlib
import re
from itertools import chain

import numpy as np
import pytest
from helpers import ROOT, lines, make_dataset, map_tile, run, tile_of, tiny

import infer
import train
from running.config import override
from tiles import Tile

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("benchmarks/*.md"))]
README = PAGES[0].read_text()


def code_blocks(language):
    """The content of all code blocks of a language, from all pages."""
    pattern = re.compile(rf"^```{language}\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
    return list(chain(*(pattern.findall(page.read_text()) for page in PAGES)))


def readme_commands():
    """(script, [key=value, ..]) of every command in the code blocks, and in the Slurm script."""
    commands = "\n".join([*code_blocks("bash"), (ROOT / "docs/slurm.sh").read_text()])
    for line in commands.replace("\\\n", " ").replace("&&", "\n").splitlines():
        if found := re.search(r"(\w+)\.py(.*)", line):
            yield found[1], [word for word in found[2].split() if "=" in word]


def test_the_commands_of_the_readme_have_keys_that_exist():
    commands = list(readme_commands())
    assert {"train", "train_classification", "infer", "create_false_color_map"} <= {
        script for script, _ in commands
    }
    for script, arguments in commands:
        override(importlib.import_module(script).run_config, arguments)


def test_the_pictures_and_linked_files_are_there():
    for page in PAGES:
        for link in re.findall(r"\[.*?\]\(([^)#]+).*?\)", page.read_text()):
            assert link.startswith("https://") or (page.parent / link).exists(), (page, link)


def test_every_module_and_script_is_in_a_table():
    for file in ROOT.glob("*.py"):
        assert f"| `{file.name}` |" in README, file.name


def test_the_lines_that_embed_an_array_give_what_a_map_has(workplace, tmp_path, monkeypatch):
    (code,) = [code for code in code_blocks("python") if not code.startswith("# ")]
    lines_of_work = [line for line in code.splitlines() if " = " in line]
    assert len(lines_of_work) == 6, "the README says six"
    tile = Tile(tile_of(workplace))
    clear = tile.masks.reshape(20, -1).T == 1  # (pixels, dates)
    bands, doys = np.zeros((len(clear), 20, 10), np.uint16), np.zeros((len(clear), 20), np.int16)
    for pixel, dates in enumerate(clear):
        bands[pixel, : dates.sum()] = tile.bands.reshape(20, -1, 10)[dates, pixel]
        doys[pixel, : dates.sum()] = tile.doys[dates]
    np.save(tmp_path / "series.npy", bands)
    np.save(tmp_path / "series_doys.npy", doys)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/simulated").symlink_to(workplace / "pretrained")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    (folder,) = map_tile(workplace, tmp_path / "map", checkpoint="pretrained")
    mapped = np.load(folder / "representation_map.npy").reshape(len(clear), -1)
    valid = np.isfinite(mapped[:, 0])
    assert valid.mean() > 0.9
    np.testing.assert_allclose(names["embeddings"][valid], mapped[valid], atol=1e-5)


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
