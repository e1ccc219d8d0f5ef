"""Small scenes on disk: GeoTIFFs, .SAFE folders and STAC items, for tests of what they declare."""

from types import SimpleNamespace

import numpy as np
import pystac
import rasterio
from stac_server import CRS, LEFT, TOP, write_collection

from preparation import local_files, pixels, sentinel2

EDGE = 24  # pixels along an edge of the small scenes

LOCAL = 'LOCAL_CS["national grid",UNIT["metre",1],AXIS["Easting",EAST],AXIS["Northing",NORTH]]'

UUID = "ec16dbaf-4cef-5a8f-9d72-5e83a8b9f30d"
PRODUCT = "S2B_MSIL2A_20210410T081011_N0300_R078_T37UDQ_20210410T120000"
PLACED = {"crs": CRS, "transform": rasterio.Affine(10, 0, LEFT["33UUP"], 0, -10, TOP)}


def values(seed=0, edge=EDGE):
    """Reflectance x 10000 of 300 to 3999, (edge, edge)."""
    return np.random.default_rng(seed).integers(300, 4000, (edge, edge))


def write_raster(path, *arrays, dtype="uint16", names=(), scales=1, offsets=0, **options):
    """A GeoTIFF of bands (h, w), on the ground of 33UUP if options do not place it elsewhere."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stack = np.stack(arrays).astype(dtype)
    shape = dict(zip(("count", "height", "width"), stack.shape, strict=True))
    profile = {"driver": "GTiff", "dtype": dtype, **PLACED, **shape, **options}
    with rasterio.open(path, "w", **profile) as file:
        file.write(stack)
        if names:
            file.descriptions = names
        if scales != 1 or offsets:
            file.scales = (scales,) * len(stack)
            file.offsets = (offsets,) * len(stack)
    return path


def write_day(path, red, nir=None, **options):
    """A GeoTIFF of one day: B04, B8A and an SCL of vegetation."""
    nir = red if nir is None else nir
    names = ("B04", "B8A", "SCL")
    return write_raster(path, red, nir, np.full(red.shape, 4), names=names, **options)


def write_images(folder, **options):
    """B04, B8A and SCL of one scene, a file each: {band: path}."""
    bands = {"B04": values(1), "B8A": values(2), "SCL": np.full((EDGE, EDGE), 4)}
    return {band: write_raster(folder / f"{band}.tif", a, **options) for band, a in bands.items()}


def make_item(name, day, images, bbox=(14.9, 48.7, 15.1, 48.8), **properties):
    """A STAC item. properties: by name, with __ for a colon."""
    west, south, east, north = bbox
    ring = [[west, south], [east, south], [east, north], [west, north], [west, south]]
    known = {"datetime": f"{day}T10:10:00Z"}
    known |= {key.replace("__", ":"): value for key, value in properties.items()}
    return {
        "type": "Feature",
        "stac_version": "1.0.0",
        "id": name,
        "collection": "sentinel-2-l2a",
        "geometry": {"type": "Polygon", "coordinates": [ring]},
        "bbox": list(bbox),
        "properties": known,
        "links": [],
        "assets": {band: {"href": str(href)} for band, href in images.items()},
    }


def save(folder, *items):
    """items_path of a saved search."""
    folder.mkdir(parents=True, exist_ok=True)
    return str(write_collection(folder / "collection.json", list(items)))


def local(folder, **keys):
    """The keys of a local folder of GeoTIFFs that declare no baseline."""
    keys = {"local_path": str(folder), "mgrs_tile": "", "offset": "applied"} | keys
    return {"bands": "B04,B8A"} | keys


def local_item(file):
    """The item of one GeoTIFF."""
    keys = {"mgrs_tile": "", "local_bands": "", "local_scale": 0.0, "local_mask": "auto"}
    request = SimpleNamespace(**keys, skip_bad_items=False)
    (item,) = local_files.geotiff_items([file], file.parent, request)
    return item


def read(path, band=1, name="B04", grid=None, resampling="nearest"):
    """`read_band` of a file, on its own grid if no other is given."""
    item = pystac.Item("x", None, None, pystac.utils.str_to_datetime("2021-06-05T10:00:00Z"), {})
    fields = {sentinel2.BAND_KEY: band}
    item.add_asset(name, pystac.Asset(str(path), extra_fields=fields))
    grid = grid or pixels.source_grid(item, name, 0)
    return pixels.read_band(item, name, grid, resampling, 0)


def items_of(tmp_path, **options):
    """Keys of a saved search of one scene, written with these options."""
    images = write_images(tmp_path / "items", **options)
    item = make_item("S2A_33UUP_20210410_0_L2A", "2021-04-10", images)
    return {"items_path": save(tmp_path, item), "offset": "applied", "bands": "B04,B8A"}


# ---- what the metadata of products and items say -------------------------------------------------


def write_safe(folder, baseline="0212", offset=None, metadata=True, day="20210606", level="L2A"):
    """A .SAFE folder whose MTD_MSIL2A.xml declares an offset (None: none). Returns its path."""
    name = f"S2A_MSI{level}_{day}T101031_N{baseline}_R022_T33UUP_{day}T233333.SAFE"
    product, shift = folder / name, -(offset or 0)
    for band, pixel in (("B04", 10), ("B8A", 20), ("SCL", 20)):
        edge = 480 // pixel
        array = np.full((edge, edge), 4) if band == "SCL" else values(edge=edge) + shift
        path = product / "GRANULE" / "L2A_T33UUP" / "IMG_DATA" / f"R{pixel}m"
        write_raster(
            path / f"T33UUP_{day}T101031_{band}_{pixel}m.jp2",
            array,
            driver="JP2OpenJPEG",
            REVERSIBLE="YES",
            QUALITY=100,
            transform=rasterio.Affine(pixel, 0, LEFT["33UUP"], 0, -pixel, TOP),
        )
    lines = [f"<BOA_ADD_OFFSET band_id='{i}'>{offset}</BOA_ADD_OFFSET>" for i in range(13)]
    lines = [] if offset is None else lines
    lines.append("<BOA_QUANTIFICATION_VALUE unit='none'>10000</BOA_QUANTIFICATION_VALUE>")
    if metadata:
        text = f"<n1:P xmlns:n1='x'><A>{''.join(lines)}</A></n1:P>"
        (product / "MTD_MSIL2A.xml").write_text(text)
    return product
