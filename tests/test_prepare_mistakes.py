"""prepare_tiles.py where there is nothing to prepare from."""

import subprocess
import sys

import pytest
from helpers import ROOT
from scenes import prepare

from preparation import plan
from running.errors import InputError


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "BLOCK", 128)  # so that a tile has four
        yield


def test_sources_that_are_none_end_in_one_line(tmp_path):
    (tmp_path / "text.json").write_text("hello")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "item.json").write_text('{"type": "Feature", "stac_version": "1.0.0", "id": "x"}')
    for keys, message in [
        ({"items_path": str(tmp_path / "none.json")}, "found no file, wanted an ItemCollection"),
        ({"items_path": str(tmp_path / "text.json")}, "found no ItemCollection"),
        ({"items_path": str(tmp_path / "list.json")}, "found no ItemCollection"),
        ({"items_path": str(tmp_path / "item.json")}, "found no ItemCollection"),
        ({"local_path": str(tmp_path / "none")}, "found no folder"),
        ({"local_path": str(tmp_path)}, "found no .tif and no .SAFE"),
        ({"stac_url": "http://127.0.0.1:9", "retries": 0}, "the search failed"),
        ({"mgrs_tile": "hello"}, "mgrs_tile=HELLO: wanted a tile like 33UUP"),
        ({"mgrs_tile": ""}, "mgrs_tile: found none"),
    ]:
        with pytest.raises(InputError, match=message) as error:
            prepare(tmp_path, **keys)
        assert "\n" not in str(error.value)


@pytest.mark.slow
def test_without_its_requirements_one_line_says_what_to_install(tmp_path):
    code = (
        "import sys\n"
        "for name in ('pystac', 'pystac_client', 'odc', 'geopandas', 'mgrs', 'pyogrio'):\n"
        "    sys.modules[name] = None\n"
        "import prepare_tiles\nfrom running.script import run_script\n"
        "sys.argv[1:] = ['mgrs_tile=33UUP', 'base_path=' + sys.argv[1]]\n"
        "run_script(prepare_tiles.main, prepare_tiles.run_config, '')\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 1 and len(lines) == 1
    assert lines[0].endswith("not installed, wanted pip install -r requirements-prepare.txt")
