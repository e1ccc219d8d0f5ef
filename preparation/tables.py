"""Tables in long form: a row for each observation of a pixel, in any order, of any length.

Rows are sorted by pixel in files beside the output, a group of pixels in each, so that memory does
not grow with the rows; only the ids of all pixels stay in memory.

Shapes: N pixels, T dates, B bands.
"""

from dataclasses import dataclass, field
from pathlib import Path

from running.errors import InputError

import numpy as np

from preparation import need
from trained.encoder import has_data, read_dates

OPTIONAL = "requirements-tables.txt"
PARQUET = (".parquet", ".pq")
BATCH_ROWS, GROUP_PIXELS = 1 << 17, 1 << 14  # read at once, and sorted into one file
FALSE, TRUE = ("0", "0.0", "false", "no", ""), ("1", "1.0", "true", "yes")
EMPTY = ["", "NA", "N/A", "NaN", "nan", "null", "NULL", "None"]  # cells without a number


@dataclass
class Columns:
    """Names of the columns. clear, label: "" where the table has none. bands: B names."""

    id: str
    date: str
    bands: list
    clear: str = ""
    label: str = ""


@dataclass
class Table:
    """A long table, sorted by pixel into files of a folder.

    ids and labels (label of a pixel's first row, or None) in the order of their first rows.
    is_dated: whether days are days since 1970, not days of year.
    """

    path: Path
    columns: Columns
    folder: Path
    ids: dict = field(default_factory=dict)
    labels: list = field(default_factory=list)
    is_dated: bool | None = None
    repeated: int = 0  # clear rows left out, since their pixel has another one of the date

    @property
    def row_type(self):
        bands = ("bands", "<f4", (len(self.columns.bands),))
        return np.dtype([("pixel", "<i8"), ("day", "<i4"), bands])

    def add(self, frame):
        """Sort the rows of a pandas DataFrame into the files. Raises InputError."""
        columns = self.columns
        if frame[columns.id].isna().any():
            raise InputError(f"{self.path}: found a row without {columns.id}, wanted one in each")
        rows = np.empty(len(frame), self.row_type)
        rows["pixel"] = self._number_pixels(frame)
        rows["day"] = self._days(frame[columns.date])
        for place, name in enumerate(columns.bands):
            rows["bands"][:, place] = self._numbers(frame[name])
        clear = has_data(rows["bands"])
        clear &= self._clear(frame[columns.clear]) if columns.clear else True
        rows = rows[clear]
        rows = rows[np.argsort(rows["pixel"], kind="stable")]
        groups = rows["pixel"] // GROUP_PIXELS
        for group in np.unique(groups):
            first, last = np.searchsorted(groups, [group, group + 1])
            with open(self.folder / str(group), "ab") as file:
                rows[first:last].tofile(file)

    def _number_pixels(self, frame):
        """Number of the pixel of each row, (R,) int64; new pixels are added to ids and labels."""
        columns, pandas = self.columns, need("pandas", OPTIONAL)
        codes, _ = pandas.factorize(frame[columns.id])  # in the order of their first rows
        first = frame.drop_duplicates(columns.id)
        names = first[columns.id].tolist()
        labels = first[columns.label].tolist() if columns.label else [None] * len(names)
        for name, label in zip(names, labels, strict=True):
            if name not in self.ids:
                self.ids[name] = len(self.ids)
                self.labels.append(None if pandas.isna(label) else label)
        return np.array([self.ids[name] for name in names], np.int64)[codes]

    def _days(self, column):
        """Days since 1970 or days of year (R,), of a column of dates."""
        pandas = need("pandas", OPTIONAL)
        if column.isna().any():
            raise InputError(f"{self.path}: found a row without {self.columns.date}, wanted dates")
        numbers = pandas.to_numeric(column, errors="coerce")
        is_number = column.dtype.kind != "M" and not numbers.isna().any()
        values = numbers if is_number else column
        try:
            days = read_dates(values.to_numpy(None if column.dtype.kind in "iufM" else object))
        except InputError as error:
            line = str(error).removeprefix("dates: ")
            raise InputError(f"{self.path}: column {self.columns.date}: {line}") from None
        is_dated = days.dtype.kind == "M"
        if self.is_dated not in (None, is_dated):
            raise InputError(f"{self.path}: found days of year and dates, wanted one of the two")
        self.is_dated = is_dated
        if not is_dated and days.min(initial=1) < 1:
            raise InputError(f"{self.path}: found day of year 0, wanted 1 to 366")
        return days.astype(np.int64)

    def _numbers(self, column):
        """Float32 (R,) of a column of numbers; NaN where it is empty."""
        numbers = need("pandas", OPTIONAL).to_numeric(column, errors="coerce")
        wrong = column[numbers.isna() & column.notna()]
        if len(wrong):
            found = f"{column.name} {wrong.iloc[0]!s:.40}"
            raise InputError(f"{self.path}: found {found}, wanted a number or an empty cell")
        return numbers.to_numpy(np.float32, na_value=np.nan)

    def _clear(self, column):
        """Whether each row is clear, (R,) bool; an empty cell is not."""
        texts = column.astype(object).where(column.notna(), "").astype(str).str.strip().str.lower()
        wrong = texts[~texts.isin(TRUE + FALSE)]
        if len(wrong):
            found = f"{column.name} {wrong.iloc[0]}"
            raise InputError(f"{self.path}: found {found}, wanted 1 (clear) or 0 (not clear)")
        return texts.isin(TRUE).to_numpy()

    def describe_pixels(self):
        """{name of the column: ids or labels of all pixels, a list}. InputError for no pixel."""
        if not self.ids:
            raise InputError(f"{self.path}: found no row, wanted some")
        known = {self.columns.id: list(self.ids)}
        if self.columns.label:
            known[self.columns.label] = self.labels
        if self.path.suffix.lower() in PARQUET:
            return known
        return {name: _as_numbers(texts) for name, texts in known.items()}

    def groups(self):
        """Yield (first, last + 1, reflectance (n, T, B), dates (n, T)) of groups of pixels.

        Padded with NaN and with NaT or 0; T is the longest series of the group. Of clear rows of
        one pixel and date the first counts. Raises InputError for series of more than a year.
        """
        names, self.repeated = list(self.ids), 0
        for first in range(0, len(names), GROUP_PIXELS):
            last = min(first + GROUP_PIXELS, len(names))
            file = self.folder / str(first // GROUP_PIXELS)
            rows = np.fromfile(file, self.row_type) if file.exists() else np.empty(0, self.row_type)
            rows = rows[np.lexsort((rows["day"], rows["pixel"]))]  # stable: the first row first
            again = (np.diff(rows["pixel"]) == 0) & (np.diff(rows["day"]) == 0)
            rows = rows[~np.append(False, again)[: len(rows)]]
            self.repeated += int(again.sum())
            yield first, last, *self._series(rows, first, names[first:last])

    def _series(self, rows, first, names):
        pixel = rows["pixel"] - first
        counts = np.bincount(pixel, minlength=len(names))
        starts = np.cumsum(counts) - counts
        place = np.arange(len(rows)) - starts[pixel]
        shape = (len(names), max(1, counts.max(initial=0)))
        reflectance = np.full((*shape, len(self.columns.bands)), np.nan, np.float32)
        reflectance[pixel, place] = rows["bands"]
        if not self.is_dated:
            dates = np.zeros(shape, np.int16)
            dates[pixel, place] = rows["day"]
            return reflectance, dates
        dates = np.full(shape, np.datetime64("NaT"), "datetime64[D]")
        dates[pixel, place] = rows["day"].astype("datetime64[D]")
        has = np.flatnonzero(counts)
        begin, end = dates[has, 0], dates[has, counts[has] - 1]
        for number in np.flatnonzero(end - begin > np.timedelta64(365, "D"))[:1]:
            raise InputError(
                f"{self.path}: found {begin[number]} to {end[number]} for {self.columns.id} "
                f"{names[has[number]]}, wanted a year at most (an id for each year)"
            )
        return reflectance, dates


def column_names(path):
    """The names of a table's columns. Raises InputError for a file that cannot be read."""
    if path.suffix.lower() in PARQUET:
        return _open_parquet(path).schema_arrow.names
    try:
        return list(need("pandas", OPTIONAL).read_csv(path, nrows=0, sep=_separator(path)).columns)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None


def read_table(path, columns):
    """Yield a table in pandas DataFrames of BATCH_ROWS rows. Raises InputError.

    Ids, dates and labels of a CSV file are text, so that they mean the same in every batch.
    """
    names = [columns.id, columns.date, *columns.bands, columns.clear, columns.label]
    names = list(dict.fromkeys(name for name in names if name))
    try:
        if path.suffix.lower() in PARQUET:
            for batch in _open_parquet(path).iter_batches(BATCH_ROWS, columns=names):
                yield batch.to_pandas()
            return
        text = [name for name in (columns.id, columns.date, columns.label) if name]
        empty = dict.fromkeys(columns.bands, EMPTY) | dict.fromkeys(text, [""])
        options = {"usecols": names, "sep": _separator(path), "low_memory": False}
        options |= {"dtype": dict.fromkeys(text, str), "keep_default_na": False, "na_values": empty}
        with need("pandas", OPTIONAL).read_csv(path, chunksize=BATCH_ROWS, **options) as batches:
            yield from batches
    except (OSError, ValueError) as error:  # pyarrow's and pandas' errors are ValueErrors
        if isinstance(error, InputError):
            raise
        raise _unreadable(path, error) from None


def _separator(path):
    """What divides the columns in the first line: a comma, a semicolon or a tab."""
    with open(path, encoding="utf-8", errors="replace") as file:
        header = file.readline(1 << 20)
    return max(",;\t", key=header.count)


def _open_parquet(path):
    need("pyarrow", OPTIONAL)
    try:
        return need("pyarrow.parquet", OPTIONAL).ParquetFile(path)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path, error):
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return InputError(f"{path}: found no readable table ({line:.200}), wanted CSV or Parquet")


def _as_numbers(texts):
    """Text of a CSV file as whole numbers, where all of it is; None stays."""
    plain = [text for text in texts if text is not None]
    if all(isinstance(text, str) and text.isdecimal() and str(int(text)) == text for text in plain):
        return [None if text is None else int(text) for text in texts]
    return list(texts)
