"""item.json beside a map: a STAC item with its place, dates, files and what it was made from.

Needs rio-stac (requirements-export.txt); without it no item is written.
"""

import re
from datetime import datetime

from running.checkpoints import FORMAT_VERSION
from running.errors import notice
from running.files import write_json

import rasterio
import torch
from rasterio._err import CPLE_BaseError  # GDAL's, without a public name
from rasterio.errors import RasterioError

from maps.products import made_products

COG = "image/tiff; application=geotiff; profile=cloud-optimized"
# of STAC, with the versions whose fields are written; rio-stac names projection itself
EXTENSIONS = ("raster/v1.1.0", "processing/v1.1.0", "classification/v2.0.0")
# of infer.json, how a map was made; files and their hashes are in infer.json, which is an asset
LINEAGE = ("season", "dates", "draws", "min_valid", "representation_format", "dimensions")


def write_item(output_dir, tile, made_by, legend):
    """Write item.json for the GeoTIFFs and pictures of a tile's map.

    made_by: as in infer.json; legend: {code: {"name", "color"}} of its classes. A tile without
    dates in tile.json or without a place on the Earth has no item, and a line says why.
    """
    try:
        import rio_stac  # optional
    except ImportError:
        notice("no item.json (STAC): wanted pip install -r requirements-export.txt")
        return
    if not tile.info.get("dates"):
        notice(f"{tile.path / 'tile.json'}: found no dates, so there is no item.json (STAC)")
        return
    days = sorted(tile.info["dates"][place] for place in tile.dates)
    start, end = (datetime.fromisoformat(day) for day in (days[0], days[-1]))
    paths = [output_dir / f"{one.name}.tif" for one in made_products(made_by)]
    paths, sha256 = [path for path in paths if path.exists()], made_by["checkpoint_sha256"]
    try:
        item = rio_stac.create_stac_item(
            str(paths[0]),
            id=f"{tile.name}_{start:%Y%m%d}_{end:%Y%m%d}_{sha256[:8]}",
            properties={
                "title": f"Maps of {tile.title}",
                "start_datetime": f"{start:%Y-%m-%d}T00:00:00Z",
                "end_datetime": f"{end:%Y-%m-%d}T23:59:59Z",
                "processing:lineage": describe_lineage(tile, made_by),
                "processing:software": name_software(),
            },
            extensions=[f"https://stac-extensions.github.io/{e}/schema.json" for e in EXTENSIONS],
            assets=find_assets(output_dir, paths, legend),
            with_proj=True,
            geom_densify_pts=5,
            geom_precision=7,
        )
    except (RasterioError, CPLE_BaseError):
        notice(f"{tile.path / 'tile.json'}: found a crs without degrees, so there is no item.json")
        return
    write_json(output_dir / "item.json", item.to_dict(include_self_link=False))


def name_software():
    """{name: version} of what makes a map."""
    return {
        "infer.py": f"checkpoint format {FORMAT_VERSION}",
        "torch": torch.__version__,
        "rasterio": rasterio.__version__,
    }


def describe_lineage(tile, made_by):
    """What a map was made from, in a line."""
    keys = ", ".join(f"{key}={made_by[key]}" for key in LINEAGE)
    return f"{tile.name}, checkpoint of SHA-256 {made_by['checkpoint_sha256']}, {keys}"


def find_assets(output_dir, paths, legend):
    """The files of a map as assets: GeoTIFFs with statistics, pictures, infer.json."""
    import rio_stac.stac
    from pystac import Asset

    assets = {}
    for path in paths:
        with rasterio.open(path) as file:
            # of many bands, statistics would take longer than the map
            bands = rio_stac.stac.get_raster_info(file) if file.count < 5 else []
        fields = {"raster:bands": bands} if bands else {}
        if path.stem == "classification_map":
            fields["classification:classes"] = describe_classes(legend)
        more = {"media_type": COG, "roles": ["data"], "extra_fields": fields}
        assets[path.stem] = Asset(f"./{path.name}", **more)
    for name in ("classification_map.png", "regression_map.png"):
        if (output_dir / name).exists():
            assets["overview"] = Asset(f"./{name}", media_type="image/png", roles=["overview"])
    assets["provenance"] = Asset("./infer.json", media_type="application/json", roles=["metadata"])
    return assets


def describe_classes(legend):
    """`classification:classes` of a legend, with 0 for no data."""
    classes = [{"value": 0, "name": "no_data", "title": "no data", "nodata": True}]
    for code, entry in legend.items():
        name = re.sub(r"\W+", "_", entry["name"], flags=re.ASCII).strip("_") or f"class_{code}"
        color = entry["color"].lstrip("#")
        classes.append({"value": code, "name": name, "title": entry["name"], "color_hint": color})
    return classes
