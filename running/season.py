"""A season: the days of year whose observations are read, from the keys start= and end=."""

from datetime import date

from running.errors import InputError

ALL_YEAR = (1, 366)


def read_day(key, text):
    """The day of year, 1..366, of a key's text; 0 for "".

    text: a day of year, month and day (04-01, as in a year of 365 days) or a date (2024-04-01).
    Raises InputError that names the key.
    """
    try:
        if len(text) < 4:
            day = int(text or 0)
        else:
            day = date.fromisoformat(text if len(text) > 5 else f"2001-{text}").timetuple().tm_yday
    except ValueError:
        day = -1
    if text and not 1 <= day <= 366:
        wanted = "a day of year 1 to 366, a month and day like 04-01 or a date like 2024-04-01"
        raise InputError(f"{key}={text}: wanted {wanted}")
    return day


def find_season(config, before=None):
    """First and last day of year, (1, 366) for the whole year, of the keys start and end.

    before: the config that says what an empty key means; None: the first and the last day.
    """
    before = before or {}
    days = (read_day(key, config[key] or str(before.get(key, ""))) for key in ("start", "end"))
    return tuple(day or limit for day, limit in zip(days, ALL_YEAR, strict=True))


def name_season(season):
    """A season as infer.json has it, "305 to 90"."""
    return f"{season[0]} to {season[1]}"


def in_season(days, start, end):
    """Whether days of year (an array) lie in a season; where start > end it crosses New Year."""
    return (days - start) % 366 <= (end - start) % 366
