"""Embed tables of series (CSV, Parquet) and cubes (zarr, xarray); with a fine-tuned checkpoint
also their classes.

    python embed.py checkpoint_path=checkpoints/simulated/best.pt \\
        data_path=series.csv output_path=embeddings.parquet
    python embed.py checkpoint_path=checkpoints/landcover/best.pt \\
        data_path=cube.zarr output_path=landcover.zarr scale=10000
    python embed.py data_path=series.csv bands=B02,B03,B04,B08 \\
        output_path=data/points/processed/MGRS-points     # a tile to train on, not an embedding

A table has a row for each observation of a pixel, in any order: id, date, the bands and, if there
are, clear (1 or 0) and label. A cube has time, y, x and band, or a variable for each band. Both are
read in parts: memory does not grow with them. docs/tables.md has more.
"""

import tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path

from running.config import check, in_season
from running.errors import InputError, notice
from running.files import atomic_write, create_npy, make_output_dir
from running.log import ProgressBar, refuse_training_folder, start_log
from running.script import refuse_torchrun, run_script

import numpy as np

from preparation import need
from preparation.cubes import cube_writer, is_cube, legend_attributes, open_cube
from preparation.table_tile import write_table_tile
from preparation.tables import OPTIONAL, PARQUET, Columns, Table, column_names, read_table
from trained.encoder import Encoder, days_of_year, has_data

run_config = {
    # input
    "checkpoint_path": "",  # of train.py, train_classification.py or train_regression.py
    "data_path": "",  # a table (.csv, .parquet), or a cube (.zarr, .nc)
    "bands": "",  # names of the bands in the data, in the checkpoint's order; empty: its names
    "scale": 1.0,  # of the values, 10000 for reflectance of 0 to 1
    # of a table
    "id_column": "id",  # of the pixel (point, field, ..) that a row belongs to
    "date_column": "date",  # dates like 2021-06-05, or days of year
    "clear_column": "clear",  # 1 clear, 0 not; also a variable of a cube; where there is none: all
    "label_column": "label",  # copied to the output, where there is one
    # of a cube
    "dims": "time,y,x,band",  # the names of its dimensions, in this order of meaning
    "variable": "",  # empty: the only one with these dimensions, or one for each band
    # output
    "output_path": "",  # .parquet, .csv, .npy, or MGRS-* (a tile to train on); of a cube .zarr
    "overwrite": False,  # replace output_path where it exists
    # embeddings, as in infer.py
    "classify": "auto",  # auto: where the checkpoint is fine-tuned; true: refuse others; false
    "min_valid": 0,  # clear observations that a pixel needs; 0: as in training
    "start": "",  # day of year or date (90, 04-01): of a season, as in infer.py; empty: ..
    "end": "",  # .. as in training
    "dates": 24,  # clear dates of a pixel that are read, at most, evenly spaced; 0: all
    "dimensions": 0,  # of the embeddings, the first ones; 0: all
    "draws": 0,  # above 0: the mean of N even samples of sample_size dates, from all clear dates
    # running
    "device": "auto",  # auto, cpu or cuda
    "wandb_mode": "auto",  # auto (online where logged in), online, offline or disabled
    "wandb_dir": "",  # its folder wandb/ gets all runs; empty: WANDB_DIR, or where you are
}


def check_output(config):
    """The output's path. Raises InputError for one of another kind, or one that exists."""
    path, data = Path(config["output_path"]), Path(config["data_path"])
    if not config["data_path"] or not data.exists():
        raise InputError(f"data_path={config['data_path']}: found no such table or cube")
    kind, endings = ("cube", (".zarr",)) if is_cube(data) else ("table", (*PARQUET, ".csv", ".npy"))
    if path.suffix not in endings and not (kind == "table" and path.name.startswith("MGRS-")):
        raise InputError(f"output_path={path}: wanted a name in {', '.join(endings)} of a {kind}")
    for file in {path, ids_file(path)}:
        if file.exists() and (not config["overwrite"] or file.resolve() == data.resolve()):
            raise InputError(f"output_path={path}: found {file}, wanted another or overwrite=true")
    refuse_training_folder(make_output_dir(path.parent))
    return path


def wanted_bands(config, encoder):
    """What the input calls the checkpoint's bands, in its order; [] where nothing says it."""
    bands = [name.strip() for name in config["bands"].split(",") if name.strip()]
    count = len(encoder.checkpoint["mean"])
    if bands and len(bands) != count:
        wanted = f"{count} as in {encoder.path}: {', '.join(encoder.bands)}"
        raise InputError(f"bands={config['bands']}: found {len(bands)} bands, wanted {wanted}")
    return bands or encoder.bands


def encode(encoder, reflectance, dates, clear, config):
    """What is written of each pixel: {name: array (.., ) or (.., D)}, as in the output."""
    keys = {"scale": config["scale"], "max_dates": config["dates"], "draws": config["draws"]}
    embeddings, answers = encoder.encode(reflectance, dates, clear, **keys)
    is_clear = has_data(reflectance) & (True if clear is None else clear == 1)
    is_clear &= in_season(days_of_year(dates), *encoder.season)
    found = {"embedding": embeddings, "valid_count": is_clear.sum(-1).astype(np.uint16)}
    if encoder.target:
        found["value"] = answers
    elif answers is not None:
        codes, names, _ = encoder.choose(answers)
        found |= {"class_code": codes, "class_name": names, "confidence": answers.max(-1)}
    return found


# ---- tables --------------------------------------------------------------------------------------


def find_columns(path, config, bands):
    """The Columns of a table. Raises InputError that lists the columns where one is missing."""
    names = column_names(path)
    if not bands:
        raise InputError(f"bands={config['bands']}: found no names of bands, wanted B02,B03,..")
    wanted = {"id_column": config["id_column"], "date_column": config["date_column"]}
    wanted |= {
        f"band {number} of {len(bands)}, bands=": name for number, name in enumerate(bands, 1)
    }
    optional = {key: config[key] for key in ("clear_column", "label_column")}
    wanted |= {key: name for key, name in optional.items() if name != run_config[key]}
    for key, name in wanted.items():
        if name and name not in names:
            raise InputError(f"{path}: found no column {name} ({key}), but {', '.join(names)}")
    clear, label = (name if name in names else "" for name in optional.values())
    if not clear:
        notice(f"{path}: found no column {config['clear_column']}; all rows are taken as clear")
    return Columns(config["id_column"], config["date_column"], list(bands), clear, label)


def ids_file(output):
    """Where the ids of a table go: into the output itself, or beside it for .npy."""
    return output.with_suffix(".csv") if output.suffix == ".npy" else output


def as_cells(values):
    """An array of pyarrow, in which NaN and None are empty cells."""
    arrow = need("pyarrow", OPTIONAL)
    if isinstance(values, arrow.Array):
        return values
    cells = arrow.array(values, from_pandas=True)
    return cells.cast("string") if cells.type == arrow.null() else cells


@contextmanager
def table_writer(output, count, size):
    """Yield write(columns): a dict of arrays (n,), and "embedding" (n, D), of the next n pixels.

    count, size: N and D. All files are renamed to their names at the end.
    """
    arrow, done = need("pyarrow", OPTIONAL), 0
    with ExitStack() as stack:
        part, writer, array = stack.enter_context(atomic_write(ids_file(output))), None, None
        if output.suffix == ".npy":
            array = create_npy(stack.enter_context(atomic_write(output)), "float32", (count, size))

        def write(columns):
            nonlocal writer, done
            embeddings = columns.pop("embedding")
            if array is None:
                columns |= {f"e{number}": values for number, values in enumerate(embeddings.T)}
            else:
                array[done : done + len(embeddings)] = embeddings
            done += len(embeddings)
            rows = arrow.table({name: as_cells(part) for name, part in columns.items()})
            if not writer:
                kind = (
                    need("pyarrow.parquet", OPTIONAL).ParquetWriter
                    if part.suffix in PARQUET
                    else None
                )
                kind = kind or need("pyarrow.csv", OPTIONAL).CSVWriter
                writer = stack.enter_context(kind(part, rows.schema))
            writer.write_table(rows)

        yield write
        if array is not None:
            array.flush()


@contextmanager
def sorted_table(path, columns, folder):
    """Yield the Table of a file, sorted in a temporary folder inside `folder`."""
    with tempfile.TemporaryDirectory(prefix=".embed-", dir=folder) as rows:
        table = Table(path, columns, Path(rows))
        with ProgressBar(desc=f"reading {path.name}", unit=" rows", unit_scale=True) as bar:
            for frame in read_table(path, columns):
                table.add(frame)
                bar.update(len(frame))
        yield table
    if table.repeated:
        print(
            f"{path}: {table.repeated} clear rows have the {columns.id} and the {columns.date} of "
            "an earlier one and are left out"
        )


def embed_table(path, output, encoder, config):
    """Write the embeddings of a table. Returns the pixels, and how many have an embedding."""
    columns = find_columns(path, config, wanted_bands(config, encoder))
    encoded = 0
    with sorted_table(path, columns, output.parent) as table:
        known = {name: as_cells(part) for name, part in table.describe_pixels().items()}
        bar = ProgressBar(total=len(table.ids), desc="embedding", unit=" pixels")
        with bar, table_writer(output, len(table.ids), encoder.size) as write:
            for first, last, reflectance, dates in table.groups():
                found = encode(encoder, reflectance, dates, None, config)
                encoded += int(np.isfinite(found["embedding"]).all(1).sum())
                write({name: part[first:last] for name, part in known.items()} | found)
                bar.update(last - first)
    return len(table.ids), encoded


def make_tile(path, output, config):
    """Write a table as a tile of N x 1 pixels, to train on."""
    bands = [name.strip() for name in config["bands"].split(",") if name.strip()]
    with sorted_table(path, find_columns(path, config, bands), output.parent) as table:
        dates, pixels, *_ = write_table_tile(table, output, config["scale"])
    print(f"{output}: a tile of {pixels} pixels, {dates} dates, {len(bands)} bands")
    return output


# ---- cubes ---------------------------------------------------------------------------------------


def embed_cube(path, output, encoder, config):
    """Write the embeddings of a cube. Returns the pixels, and how many have an embedding."""
    dims = [name.strip() for name in config["dims"].split(",")]
    if len(set(dims)) != 4:
        raise InputError(f"dims={config['dims']}: wanted the names of time, y, x and band")
    bands = wanted_bands(config, encoder)
    cube = open_cube(path, dims, config["variable"], config["clear_column"], bands)
    days_of_year(cube.dates)  # refuses more than a year, before any work
    arrays = {
        "embedding": ("float32", encoder.size, np.nan, {"long_name": "embedding of the series"}),
        "valid_count": ("uint16", 0, 0, {"long_name": "clear observations"}),
    }
    if encoder.classes:
        arrays["class_code"] = ("uint8", 0, 0, legend_attributes(encoder.class_names))
        arrays["confidence"] = ("float32", 0, np.nan, {"long_name": "probability of the class"})
    if encoder.target:
        about = {"long_name": encoder.target["name"], "units": encoder.target["unit"]}
        arrays["value"] = ("float32", 0, np.nan, about)
    pixels, encoded = cube.shape[0] * cube.shape[1], 0
    bar = ProgressBar(total=pixels, desc="embedding", unit=" pixels", unit_scale=True)
    with bar, cube_writer(output, cube, arrays) as write:
        for block in cube.blocks():
            reflectance, clear = cube.read(block)
            found = encode(encoder, reflectance, cube.dates, clear, config)
            write(block, {name: found[name] for name in arrays})
            encoded += int(np.isfinite(found["embedding"]).all(-1).sum())
            bar.update(reflectance.shape[0] * reflectance.shape[1])
    return pixels, encoded


def main(config):
    """Embed a table or a cube. Returns the path of what was written."""
    refuse_torchrun()
    config = check(config)
    path, output = Path(config["data_path"]), check_output(config)
    if output.name.startswith("MGRS-"):
        return make_tile(path, output, config)
    keys = ("checkpoint_path", "device", "classify", "min_valid", "dimensions", "start", "end")
    encoder = Encoder.load(*(config[key] for key in keys))
    pixels, encoded = (embed_cube if is_cube(path) else embed_table)(path, output, encoder, config)
    if encoded < pixels:
        print(
            f"{path}: {pixels - encoded} pixels have fewer clear observations than min_valid="
            f"{encoder.min_valid} and get no embedding"
        )
    log = start_log(config, "embed", output.parent, encoder.runtime)
    log.line({"step": 0, "pixels": pixels, "embedded_pixels": encoded})
    log.finish()
    classes = f" and {len(encoder.classes)} classes" if encoder.classes else ""
    print(f"{output}: {encoded} of {pixels} pixels, {encoder.size} dimensions{classes}")
    return output


if __name__ == "__main__":
    run_script(main, run_config, __doc__)
