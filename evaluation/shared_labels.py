"""Answers that all rows of a comparison share: classes, or a quantity, of two data sets and maps.

The tiles are written again, with links to the observations and other labels, so that every model,
also a network that a script of its own trains, has the same pixels and classes.
"""

from running.errors import InputError, notice
from running.files import write_json
from running.tile_json import fold_name, merge_classes, merge_targets

import numpy as np

from maps.embeddings import open_maps
from maps.land_cover import class_legend
from tiles import (
    OBSERVATIONS,
    TEST,
    TRAIN,
    checkpoint_bands,
    notice_splits,
    open_dataset,
    tiles_folder,
)


def share_labels(config, sources, checkpoint, base_path, answers):
    """Write the labelled tiles of one or two data sets to <base_path>/data/, as all rows see them.

    Of two, dataset_name trains and test_dataset_name is the test, each with all of its labels, in
    the classes of one name that both have and the codes of the first. Of one, the splits are its
    own. Pixels where a map has no value lose their label, or target.
    config: of label_efficiency.py; sources: of `parse_sources`; answers: "labels" or "targets".
    Returns the maps of each split, {"train": {name: the EmbeddingMap of each tile}, "test": ..}.
    """
    names = [config["dataset_name"], *filter(None, [config["test_dataset_name"]])]
    if len({*names}) < len(names):
        raise InputError(f"test_dataset_name={names[1]}: found dataset_name, wanted another one")
    bands = checkpoint_bands(checkpoint, config["checkpoint_path"])
    sets, maps = {}, {}
    for name in names:
        tiles = sets[name] = open_dataset(config["base_path"], name, bands=bands, answers=answers)
        maps[name] = {kind: open_maps(source, name, tiles) for kind, source in sources.items()}
    if len(names) == 1:
        notice_splits(sets[names[0]])
    _refuse_shared_maps(maps)
    keys = {"block_size": checkpoint["config"]["block_size"]}
    keys |= {"seed": checkpoint["config"]["split_seed"]}
    match = {"labels": _match_labels, "targets": _match_targets}[answers]
    _write_sets(base_path, sets, answers, match(sets), maps, keys)
    return {"train": maps[names[0]], "test": maps[names[-1]]}


def _refuse_shared_maps(maps):
    """InputError where one file is the map of tiles of two data sets, the keys of `maps`."""
    paths = [{one.path for own in kinds.values() for one in own} for kinds in maps.values()]
    if len(paths) > 1 and (shared := set.intersection(*paths)):
        folders = " and ".join(f"<PATH>/{name}/<TILE>/" for name in maps)
        raise InputError(
            f"{min(shared)}: found one map for tiles of {' and '.join(maps)}, wanted {folders}"
        )


def _match_labels(sets):
    """{data set: function that reads the labels of a tile}, none of them 0; and what tile.json has.

    sets: {data set: its tiles}.
    """
    legends = {}
    for name, tiles in sets.items():
        classes = merge_classes([(tile.path / "tile.json", tile.info) for tile in tiles])
        codes = np.unique(np.concatenate([np.unique(tile.labels) for tile in tiles]))
        legends[name] = class_legend(codes, classes)
    lookups, classes = match_classes(legends)
    readers = {
        name: lambda tile, codes=codes: codes[tile.labels] for name, codes in lookups.items()
    }
    return readers, {"classes": classes}


def _match_targets(sets):
    """As `_match_labels`, of targets: NaN for none. InputError where two sets differ in unit."""
    tiles = [tile for own in sets.values() for tile in own]
    target = merge_targets([(tile.path / "tile.json", tile.info) for tile in tiles])
    return dict.fromkeys(sets, lambda tile: np.array(tile.targets)), {"target": target}


def _write_sets(base_path, sets, answers, matched, maps, split_keys):
    """matched: of `_match_labels` or `_match_targets`."""
    readers, info = matched
    nothing = {"labels": 0, "targets": np.nan}[answers]
    for place, (name, tiles) in enumerate(sets.items()):
        lost, total = dict.fromkeys(maps[name], 0), 0
        for number, tile in enumerate(tiles):
            values = readers[name](tile)
            is_labelled = values > 0 if answers == "labels" else ~np.isnan(values)
            total += is_labelled.sum()
            for kind, of_tiles in maps[name].items():
                missing = of_tiles[number].find_missing()
                lost[kind] += (missing & is_labelled).sum()
                values[missing] = nothing
            splits = tile.split_map(**split_keys)
            if len(sets) > 1:
                splits = np.full_like(splits, (TRAIN, TEST)[place])
            folder = tiles_folder(base_path, name) / tile.path.name
            _write_tile(folder, tile, {answers: values, "splits": splits}, info)
        for kind, count in lost.items():
            if count == total:
                raise InputError(f"maps={kind}=..: found no value at any labelled pixel of {name}")
            if count:
                notice(
                    f"{kind}: no value at {count} of {total} labelled pixels of {name}, which are "
                    "left out of all rows"
                )


def _write_tile(folder, tile, arrays, info):
    """A tile with the observations of another one; arrays and some of tile.json of its own."""
    folder.mkdir(parents=True)
    for name in (*OBSERVATIONS, "band_mean.npy", "band_std.npy"):
        (folder / name).symlink_to((tile.path / name).resolve())
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    write_json(folder / "tile.json", tile.info | info)


def match_classes(legends):
    """The classes of one name in all data sets, with the codes of the first. Says what is left out.

    legends: {data set: {code: {"name": ..}}}.
    Returns {data set: (256,) uint8, the new code of each code, 0 for none}, and the classes as in
    tile.json. Raises InputError for fewer than two.
    """
    first, *others = legends
    if not others:
        classes = {str(code): entry for code, entry in legends[first].items()}
        return {first: np.arange(256, dtype=np.uint8)}, classes
    names = [{fold_name(entry) for entry in legend.values()} for legend in legends.values()]
    common = set.intersection(*names)
    lookups, codes, alone = {}, {}, []
    for name, legend in legends.items():
        lookups[name] = np.zeros(256, np.uint8)
        for code, entry in legend.items():
            if fold_name(entry) in common:
                lookups[name][code] = codes.setdefault(fold_name(entry), code)
        if lost := [entry["name"] for code, entry in legend.items() if not lookups[name][code]]:
            alone.append(f"{', '.join(lost)} ({name} alone)")
    classes = {str(code): legends[first][code] for code in codes.values()}
    found = ", ".join(entry["name"] for entry in classes.values()) or "none"
    alone = f"; left out: {'; '.join(alone)}" if alone else ""
    if len(classes) < 2:
        raise InputError(
            f"{' and '.join(legends)}: found in both the classes {found}{alone}; wanted two or "
            "more of one name (classes of tile.json)"
        )
    notice(f"classes of both {' and '.join(legends)}: {found}{alone}")
    return lookups, classes


def notice_same_ground(train, test):
    """Say where test pixels lie in blocks with training labels, or may do: scores are too high."""
    known, tested = (_find_blocks(dataset) for dataset in (train, test))
    count = int(np.isin(tested, known).sum())
    if count:
        notice(
            f"{count} of {test.num_pixels} test pixels lie in blocks with labels to train on: what "
            "is the same in both sets is known, so another place may score lower"
        )
    names = {tile.name for tile in train.tiles if not tile.has_grid}
    if names := names & {tile.name for tile in test.tiles if not tile.has_grid}:
        notice(
            f"tile {sorted(names)[0]} is in both sets and has no crs and transform in tile.json: "
            "where it shows the same ground, another place may score lower"
        )


def _find_blocks(dataset):
    """The block of each pixel that takes part, of tiles that lie on a map grid."""
    blocks = [np.empty(0, np.int64)]
    for number, tile in enumerate(dataset.tiles):
        if tile.has_grid:
            row, column = np.nonzero(dataset.pixel_mask(number))
            blocks.append(tile.block_ids(row, column, dataset.block_size, number))
    return np.concatenate(blocks)
