from __future__ import annotations

import pytest

from manager.domain.cron import CronLine, parse, weekday_names

EVERY_DAY = tuple(range(1, 32))
EVERY_MONTH = tuple(range(1, 13))


def test_a_plain_line_is_read_field_by_field() -> None:
    assert parse("30 8 15 6 *") == CronLine((30,), (8,), (15,), (6,), "*", either_day=False)


def test_asterisks_are_everything() -> None:
    assert parse("* * * * *") == CronLine(
        tuple(range(60)), tuple(range(24)), EVERY_DAY, EVERY_MONTH, "*", either_day=False
    )


@pytest.mark.parametrize(
    ("field", "minutes"),
    [
        ("5,3,3", (3, 5)),
        ("10-13", (10, 11, 12, 13)),
        ("*/20", (0, 20, 40)),
        ("*/60", (0,)),
        ("10-20/5", (10, 15, 20)),
        ("10-12/7", (10,)),
        ("50/4", (50, 54, 58)),
        ("007", (7,)),
        ("0-3,*/30,59", (0, 1, 2, 3, 30, 59)),
    ],
)
def test_lists_ranges_and_steps_are_numbers(field: str, minutes: tuple[int, ...]) -> None:
    assert parse(f"{field} * * * *").minutes == minutes


@pytest.mark.parametrize(
    ("field", "months"),
    [("jan", (1,)), ("JAN-Mar", (1, 2, 3)), ("feb,dec", (2, 12)), ("jan-jul/3", (1, 4, 7)), ("12", (12,))],
)
def test_months_have_names(field: str, months: tuple[int, ...]) -> None:
    assert parse(f"0 0 1 {field} *").months == months


@pytest.mark.parametrize(
    ("field", "names"),
    [
        ("*", "*"),
        ("0", "sun"),
        ("7", "sun"),
        ("1-5", "mon,tue,wed,thu,fri"),
        ("mon-fri", "mon,tue,wed,thu,fri"),
        ("MON,Wed", "mon,wed"),
        ("monday-wednesday", "mon,tue,wed"),
        ("6-7", "sun,sat"),
        ("0-7", "sun,mon,tue,wed,thu,fri,sat"),
        ("fri-sun", "sun,fri,sat"),
        ("sun-tue", "sun,mon,tue"),
        ("sun-sun", "sun"),
        ("*/2", "sun,tue,thu,sat"),
        ("*/7", "sun"),
        ("1-5/2", "mon,wed,fri"),
        ("4/2", "thu,sat"),
        ("7/2", "sun"),
    ],
)
def test_weekdays_count_from_sunday(field: str, names: str) -> None:
    assert weekday_names(field) == names
    assert parse(f"0 0 * * {field}").weekdays == names


@pytest.mark.parametrize(
    "field",
    [
        "",
        "8",
        "-1",
        "5-1",
        "fri-mon",
        "mon-0",
        "sunny",
        "tues",
        "1,,2",
        "mon-",
        "*-5",
        "1-5/0",
        "1/",
        "²",
        "٣",
    ],
)
def test_what_is_no_weekday_is_refused(field: str) -> None:
    with pytest.raises(ValueError, match=r"weekday|runs backwards|never fires"):
        weekday_names(field)


@pytest.mark.parametrize(
    ("line", "either_day"),
    [
        ("0 0 1 * mon", True),
        ("0 0 1 * *", False),
        ("0 0 * * mon", False),
        ("0 0 */2 * mon", False),
        ("0 0 1 * */2", False),
    ],
)
def test_either_day_counts_only_when_both_are_restricted(line: str, *, either_day: bool) -> None:
    assert parse(line).either_day is either_day


@pytest.mark.parametrize(
    ("line", "same_as"),
    [
        ("@hourly", "0 * * * *"),
        ("@daily", "0 0 * * *"),
        ("@midnight", "0 0 * * *"),
        (" @Weekly ", "0 0 * * sun"),
        ("@monthly", "0 0 1 * *"),
        ("@yearly", "0 0 1 1 *"),
        ("@annually", "0 0 1 1 *"),
        ("\t0  8 *\t* 1-5 ", "0 8 * * mon-fri"),
    ],
)
def test_spelling_does_not_matter(line: str, same_as: str) -> None:
    assert parse(line) == parse(same_as)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("", "has 0 fields instead of 5"),
        ("0 8 * *", "has 4 fields instead of 5"),
        ("0 0 8 * * *", "has 6 fields instead of 5"),
        ("@reboot", "is not one of @yearly"),
        ("60 * * * *", "'60' is not a minute: expected 0-59"),
        ("* 24 * * *", "'24' is not a hour: expected 0-23"),
        ("* * 0 * *", "'0' is not a day of the month: expected 1-31"),
        ("* * last * *", "'last' is not a day of the month"),
        ("* * * 13 *", "'13' is not a month: expected 1-12 or jan-dec"),
        ("* * * january *", "'january' is not a month"),
        ("* * * mon *", "'mon' is not a month"),
        ("* * * * jan", "'jan' is not a weekday: expected 0-7 or sun-sat"),
        ("30-10 * * * *", "the range '30-10' runs backwards"),
        ("*/0 * * * *", "a step of 0 never fires"),
        ("1.5 * * * *", "'1.5' is not a minute, a range of them or a step"),
        ("? * * * *", "is not a minute, a range of them or a step"),
        ("* * L * *", "'l' is not a day of the month"),
        ("* * * * 5#2", "is not a weekday, a range of them or a step"),
    ],
)
def test_what_crontab_does_not_describe_is_refused_with_the_reason(line: str, problem: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        parse(line)
    assert problem in str(caught.value)


@pytest.mark.parametrize("line", ["0 0 31 2 *", "0 0 30 feb */2", "0 0 31 4,6,9,11 *", "0 0 30,31 2 *"])
def test_a_line_that_never_fires_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match="never fires"):
        parse(line)


def test_the_29th_of_february_comes() -> None:
    assert parse("0 0 29 2 *").days == (29,)


def test_a_day_that_never_comes_leaves_the_weekday_to_decide() -> None:
    assert parse("0 0 31 2 mon") == parse("0 0 * 2 mon")
