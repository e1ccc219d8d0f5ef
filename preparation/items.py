"""Where Sentinel-2 comes from: a STAC API, a saved search, or local files.

All sources become lists of pystac items, one a scene and tile, whose assets rasterio opens; so all
that follows is the same for them. The libraries of requirements-prepare.txt are imported where they
are used, so that this module can be imported without them.
"""

import json
import re
from datetime import timedelta
from pathlib import Path

from running.errors import InputError, what_is_there

from preparation import need, place
from preparation.local_files import local_items

SECONDS = (30, 60)  # time limits of a search: to connect, and to wait for a part of an answer


class ItemError(InputError):
    """One item is at fault: it could be left out. item_id names it."""

    def __init__(self, item_id, message):
        super().__init__(f"{item_id}: {message}")
        self.item_id = item_id


def find_items(request):
    """All items of the source that a Request names, unsorted and as they come.

    Raises InputError for a source that cannot be read.
    """
    if request.local_path:
        return local_items(request)
    if request.items_path:
        return saved_items(request.items_path)
    return search_items(request)


# ---- a search ------------------------------------------------------------------------------------


def search_items(request):
    """Items of a STAC API at a place, from a day before the first date to a day after the last."""
    client, pystac = need("pystac_client"), need("pystac")
    first, last = request.first - timedelta(1), request.last + timedelta(1)
    box = request.bbox or place.tile_bounds(request.mgrs_tile)
    items = []
    try:
        catalog = client.Client.open(
            request.stac_url, stac_io=_retrying_reader(request.retries), timeout=SECONDS
        )
        for part in place.split_at_180(box):
            search = catalog.search(
                collections=[request.collection],
                bbox=part,
                datetime=f"{first}T00:00:00Z/{last}T23:59:59Z",
                limit=100,
            )
            items += search.items()
    except (client.exceptions.APIError, pystac.STACError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"stac_url={without_secrets(request.stac_url)}: the search failed "
            f"({without_secrets(reason)}), wanted a STAC API"
        ) from None
    return items


def _retrying_reader(retries):
    """What asks a STAC API, again after errors of the network."""
    retry = need("urllib3").Retry(
        total=retries,
        backoff_factor=0.5,
        status_forcelist=(429, 500, 502, 503, 504),
        allowed_methods=None,
    )
    return need("pystac_client.stac_api_io").StacApiIO(max_retries=retry)


def without_secrets(text):
    """A text whose addresses have lost their queries, where signatures are, and passwords."""
    text = re.sub(r"//[^/\s@]*@", "//", text)
    return re.sub(r"\?\S*", "", text)


# ---- a saved search ------------------------------------------------------------------------------


def saved_items(path):
    """Items of a saved ItemCollection; hrefs that are not absolute start at its folder."""
    pystac, path = need("pystac"), Path(path)
    try:
        items = list(pystac.ItemCollection.from_dict(json.loads(path.read_text())))
    except FileNotFoundError:
        wanted = f"wanted an ItemCollection{what_is_there(path)}"
        raise InputError(f"items_path={path}: found no file, {wanted}") from None
    except Exception as error:  # what is no collection raises many kinds inside pystac
        reason = without_secrets(f"{type(error).__name__} {error}".splitlines()[0])
        raise InputError(
            f"items_path={path}: found no ItemCollection ({reason}), wanted one as JSON"
        ) from None
    for item in items:
        for asset in item.assets.values():
            if "://" not in asset.href and not asset.href.startswith("/"):
                asset.href = str((path.resolve().parent / asset.href).resolve())
    return items
