"""Files and folders as they are found, servers that do not answer, access that has run out."""

import json
import socket
import time

from running.errors import InputError

import numpy as np
import planetary_computer
import pytest
import rasterio
from scenes import prepare, settings
from small_scenes import (
    local,
    local_item,
    make_item,
    save,
    values,
    write_day,
    write_images,
    write_raster,
    write_safe,
)
from stac_server import FileServer

from preparation import items as sources
from preparation import pixels, plan, sentinel2

pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{kind}")
    for kind in (
        "DeprecationWarning",
        "PendingDeprecationWarning",
        "rasterio.errors.NotGeoreferencedWarning",
    )
]


# ---- files and folders ---------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["no SCL", "SCL broken", "level 1C", "metadata broken"])
def test_a_bad_safe_folder_can_be_left_out(tmp_path, how, capsys):
    """Regression: skip_bad_items=true left none out."""
    write_safe(tmp_path / "in")
    bad = write_safe(tmp_path / "in", day="20210410", level="L1C" if how == "level 1C" else "L2A")
    (scl,) = bad.rglob("*_SCL_*")
    if how == "no SCL":
        scl.unlink()
    elif how == "SCL broken":
        scl.write_bytes(b"broken")
    elif how == "metadata broken":
        (bad / "MTD_MSIL2A.xml").write_text("<")
    keys = {"local_path": str(tmp_path / "in"), "bands": "B04", "mgrs_tile": ""}
    with pytest.raises(InputError, match="20210410"):
        prepare(tmp_path, **keys)
    (tile,) = prepare(tmp_path, skip_bad_items=True, **keys)
    assert tile.info["dates"] == ["2021-06-06"]
    assert f"left out: {bad}" in capsys.readouterr().out.replace(str(scl), str(bad))


def test_hidden_files_are_no_scenes_and_no_bands(tmp_path):
    """Regression: ._* files, which macOS leaves on other disks, were taken for bands."""
    product = write_safe(tmp_path / "in")
    for file in [*product.rglob("*.jp2"), product]:
        hidden = file.with_name(f"._{file.name}")
        hidden.write_bytes(b"\0\5\x16\7" + b"\0" * 80)
    (tile,) = prepare(tmp_path, local_path=str(tmp_path / "in"), bands="B04", mgrs_tile="")
    np.testing.assert_array_equal(tile.bands[0, ..., 0], values(edge=48))
    write_day(tmp_path / "tifs" / "a_20210605.tif", values())
    (tmp_path / "tifs" / "._a_20210605.tif").write_bytes(b"\0\5\x16\7")
    (tile,) = prepare(tmp_path, **local(tmp_path / "tifs"))
    assert tile.shape[0] == 1


def test_folders_may_have_any_name(tmp_path):
    """Regression: what stands after # or ? was cut off."""
    folder = tmp_path / "a #b?c%d"
    write_day(folder / "in" / "a_20210605.tif", values(1), values(2))
    (tile,) = prepare(folder, **local(folder / "in"))
    np.testing.assert_array_equal(tile.bands[0, ..., 1], values(2))
    item = make_item("S2A_33UUP_20210410_0_L2A", "2021-04-10", write_images(folder / "items"))
    keys = {"items_path": save(folder, item), "offset": "applied", "bands": "B8A"}
    (tile,) = prepare(folder, **keys)
    np.testing.assert_array_equal(tile.bands[0, ..., 0], values(2))
    write_safe(folder / "safe")
    (tile,) = prepare(folder, local_path=str(folder / "safe"), bands="B04", dataset_name="safe")
    np.testing.assert_array_equal(tile.bands[0, ..., 0], values(edge=48))


@pytest.mark.parametrize(
    ("name", "day"),
    [
        ("plot_12345678_20210605", "2021-06-05"),
        ("20991231_20210605", "2021-06-05"),
        ("19900101_2021-06-05", "2021-06-05"),
        ("S2A_MSIL2A_20210605T101031_N0500_R022_T33UUP_20230118T013017", "2021-06-05"),
        ("123456789_20210605", "2021-06-05"),
        ("plot_12345678", None),
        ("plot", None),
    ],
)
def test_eight_digits_before_the_date_are_no_date(tmp_path, name, day):
    """Regression: they were taken for the date."""
    file = write_day(tmp_path / f"{name}.tif", values())
    if day is None:
        with pytest.raises(InputError, match="found no date of Sentinel-2"):
            local_item(file)
    else:
        assert str(sentinel2.solar_date(local_item(file))) == day


# ---- servers that do not answer, and access that has run out -------------------------------------


@pytest.fixture
def mute():
    """The address of a server that accepts and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(100)
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_search_without_an_answer_ends(mute, tmp_path, monkeypatch):
    """Regression: it waited for ever."""
    monkeypatch.setattr(sources, "SECONDS", (1, 0.2))
    start = time.monotonic()
    with pytest.raises(InputError, match="the search failed .*timed out.*wanted a STAC API"):
        prepare(tmp_path, stac_url=f"{mute}/?token=secret", retries=1)
    assert time.monotonic() - start < 10


def test_a_search_shows_no_token(tmp_path):
    with pytest.raises(InputError, match="the search failed") as error:
        prepare(tmp_path, stac_url="http://me:secret@127.0.0.1:9/?token=secret", retries=0)
    assert "secret" not in str(error.value) and "127.0.0.1:9" in str(error.value)


def test_a_signature_without_an_answer_ends(monkeypatch):
    monkeypatch.setattr(pixels, "SIGN_SECONDS", 0.1)
    monkeypatch.setattr(planetary_computer, "sign_url", lambda href: time.sleep(5))
    start = time.monotonic()
    with pytest.raises(OSError, match="the signing service timed out"):
        pixels.sign("https://x.blob.core.windows.net/a.tif")
    assert time.monotonic() - start < 3


@pytest.fixture
def signed(tmp_path, monkeypatch):
    """A server of two dates, and the keys of a search whose addresses have a signature."""
    monkeypatch.setattr(pixels, "PAUSE", 0.001)
    folder = tmp_path / "served"
    server = FileServer(folder)

    def search(signature="sig=secret"):
        items = []
        for day in ("2021-04-10", "2021-06-05"):
            address = f"{server.url}/{day}"
            hrefs = {
                name: f"{address}/{name}.tif?{tmp_path.name}&{signature}" for name in ("B04", "SCL")
            }
            items.append(make_item(f"S2A_33UUP_{day.replace('-', '')}_0_L2A", day, hrefs))
        keys = {"items_path": save(tmp_path, *items), "offset": "applied", "bands": "B04"}
        return keys | {"skip_bad_items": True, "retries": 1}

    for day in ("2021-04-10", "2021-06-05"):
        blocks = {"tiled": True, "blockxsize": 64, "blockysize": 64}
        write_raster(folder / day / "B04.tif", values(edge=512), **blocks)
        write_raster(folder / day / "SCL.tif", np.full((512, 512), 4), **blocks)
    yield server, search
    server.shutdown()


@pytest.mark.parametrize("answered", [0, 1])
@pytest.mark.parametrize("retries", [0, 1])
def test_access_that_has_run_out_blanks_no_date(signed, tmp_path, capsys, answered, retries):
    """Regression: a finished tile had empty dates, and signatures were printed.

    At once, and in the middle of a file, where GDAL does not say why it fails.
    """
    server, search = signed
    server.denied["/2021-06-05/B04.tif"] = answered
    with pytest.raises(InputError, match=r"0605_0_L2A: asset B04 .*403.* wanted access") as error:
        prepare(tmp_path, **search() | {"retries": retries})
    assert "\n" not in str(error.value) and "secret" not in str(error.value)
    assert "secret" not in "".join(capsys.readouterr())
    server.denied, server.expired = {}, "sig=secret"
    # the same command resumes; a new search has new signatures, and the saved ones are not used
    (tile,) = prepare(tmp_path, **search("sig=fresh"))
    assert tile.info["left_out"] == {} and tile.masks[:].all()


def test_an_image_that_is_gone_or_damaged_is_left_out(signed, tmp_path, capsys):
    server, search = signed
    file = server.folder / "2021-06-05" / "B04.tif"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    (tile,) = prepare(tmp_path, **search())
    (line,) = tile.info["left_out"].values()
    assert "asset B04 cannot be read" in line and "wanted a whole image at http" in line
    assert "secret" not in line and "secret" not in "".join(capsys.readouterr())
    assert tile.masks[0].all() and not tile.masks[1].any()


def test_an_outage_in_the_middle_of_a_file_blanks_no_date(signed, tmp_path, monkeypatch):
    server, search = signed

    def stop(*arguments):
        for path in ("B04", "SCL"):
            server.faults |= {f"/{day}/{path}.tif": 100 for day in ("2021-04-10", "2021-06-05")}
        raise rasterio.errors.RasterioIOError("Read failed. See previous exception for details.")

    monkeypatch.setattr(pixels, "_read_larger", stop)
    with pytest.raises(InputError, match="wanted a network that works"):
        prepare(tmp_path, **search() | {"retries": 0})


def test_s3_without_keys_blanks_no_date(tmp_path, monkeypatch):
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    images = write_images(tmp_path / "in")
    items = [
        make_item(f"S2A_33UUP_{day.replace('-', '')}_0_L2A", day, hrefs)
        for day, hrefs in (
            ("2021-04-10", images),
            ("2021-06-05", {"B04": "s3://bucket/B04.tif", "SCL": images["SCL"]}),
        )
    ]
    keys = {"items_path": save(tmp_path, *items), "offset": "applied", "bands": "B04"}
    with pytest.raises(
        InputError, match="0605_0_L2A: asset B04 .*AWS_.* wanted access to s3://buc"
    ):
        prepare(tmp_path, skip_bad_items=True, **keys)


def test_the_request_holds_the_config_as_it_is(tmp_path):
    config = settings(tmp_path, skip_items=" a, b,", bbox="1,2,3,4", year="2020-10")
    request = plan.parse_request(config)
    assert request.skip_items == {"a", "b"} and request.bbox == (1, 2, 3, 4)
    assert (str(request.first), str(request.last)) == ("2020-10-01", "2021-09-30")
    assert request.made_with == {key: config[key] for key in plan.RESULT_KEYS}
    assert json.loads(json.dumps(request.made_with)) == request.made_with
