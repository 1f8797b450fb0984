from __future__ import annotations

import pytest

from manager.domain.cron import parse

EVERY_MINUTE = ",".join(map(str, range(60)))
EVERY_MONTH = "1,2,3,4,5,6,7,8,9,10,11,12"


def test_a_plain_line_is_read_field_by_field() -> None:
    assert parse("30 8 15 6 1") == "30 8 15 6 1"


def test_asterisks_are_everything() -> None:
    assert parse("* * * * *") == f"{EVERY_MINUTE} * * {EVERY_MONTH} *"


@pytest.mark.parametrize(
    ("field", "minutes"),
    [
        ("5,3,3", "3,5"),
        ("10-13", "10,11,12,13"),
        ("*/20", "0,20,40"),
        ("*/60", "0"),
        ("10-20/5", "10,15,20"),
        ("10-12/7", "10"),
        ("50/4", "50,54,58"),
        ("007", "7"),
        ("0-3,*/30,59", "0,1,2,3,30,59"),
        ("0-59", EVERY_MINUTE),
    ],
)
def test_lists_ranges_and_steps_are_numbers(field: str, minutes: str) -> None:
    assert parse(f"{field} * * * *").split()[0] == minutes


@pytest.mark.parametrize("field", ["*", "*/1", "0-23", "0-11,12-23", "*,5"])
def test_every_hour_has_one_spelling(field: str) -> None:
    assert parse(f"0 {field} * * *").split()[1] == "*"


@pytest.mark.parametrize(("field", "hours"), [("*/8", "0,8,16"), ("0-22/11", "0,11,22"), ("2", "2")])
def test_an_hour_field_of_some_hours_never_begins_with_an_asterisk(field: str, hours: str) -> None:
    assert parse(f"0 {field} * * *").split()[1] == hours


@pytest.mark.parametrize(
    ("field", "months"),
    [("jan", "1"), ("JAN-Mar", "1,2,3"), ("feb,dec", "2,12"), ("jan-jul/3", "1,4,7"), ("12", "12")],
)
def test_months_have_names(field: str, months: str) -> None:
    assert parse(f"0 0 1 {field} *").split()[3] == months


@pytest.mark.parametrize(
    ("field", "numbers"),
    [
        ("*", "*"),
        ("0", "0"),
        ("7", "0"),
        ("1-5", "1,2,3,4,5"),
        ("mon-fri", "1,2,3,4,5"),
        ("MON,Wed", "1,3"),
        ("monday-wednesday", "1,2,3"),
        ("6-7", "0,6"),
        ("0-7", "0,1,2,3,4,5,6"),
        ("fri-sun", "0,5,6"),
        ("sun-tue", "0,1,2"),
        ("sun-sun", "0"),
        ("*/2", "*/2,0,2,4,6"),
        ("*/7", "*/7,0"),
        ("*/2,fri-sun", "*/2,0,2,4,5,6"),
        ("*,mon", "*"),
        ("*/1", "*"),
        ("1-5/2", "1,3,5"),
        ("4/2", "4,6"),
        ("7/2", "0"),
        ("5/2", "5"),
    ],
)
def test_weekdays_count_from_sunday(field: str, numbers: str) -> None:
    assert parse(f"0 0 * * {field}").split()[4] == numbers


@pytest.mark.parametrize(
    "field",
    [
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
        "1" * 5000,
    ],
)
def test_what_is_no_weekday_is_refused(field: str) -> None:
    with pytest.raises(ValueError, match=r"^the weekday '.*expected 0-7 or sun-sat$"):
        parse(f"0 0 * * {field}")


@pytest.mark.parametrize(
    ("line", "days"),
    [
        ("0 0 1 * mon", "1 1"),
        ("0 0 1 * *", "1 *"),
        ("0 0 * * mon", "* 1"),
        ("0 0 */15 * mon", "*/15,1,16,31 1"),
        ("0 0 1 * */4", "1 */4,0,4"),
        ("0 0 1-31 * mon", ",".join(map(str, range(1, 32))) + " 1"),
        ("0 0 1 * 0-6", "1 0,1,2,3,4,5,6"),
    ],
)
def test_a_day_field_keeps_the_asterisk_that_decides_whether_both_must_match(line: str, days: str) -> None:
    _, _, day, _, weekday = parse(line).split()
    assert f"{day} {weekday}" == days


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
        ("60 * * * *", "the minute '60': no such minute; expected 0-59"),
        ("* 24 * * *", "the hour '24': no such hour; expected 0-23"),
        ("* * 0 * *", "the day of the month '0': no such day of the month; expected 1-31"),
        ("* * last * *", "the day of the month 'last': no such day of the month; expected 1-31"),
        ("* * * 13 *", "the month '13': no such month; expected 1-12 or jan-dec"),
        ("* * * january *", "the month 'january': no such month"),
        ("* * * mon *", "the month 'mon': no such month"),
        ("* * * * jan", "the weekday 'jan': no such weekday; expected 0-7 or sun-sat"),
        ("30-10 * * * *", "the minute '30-10': the range runs backwards; expected 0-59"),
        ("*/0 * * * *", "the minute '*/0': a step of 0 never fires; expected 0-59"),
        ("1.5 * * * *", "the minute '1.5': no minute, range of them or step; expected 0-59"),
        ("? * * * *", "no minute, range of them or step; expected 0-59"),
        ("* * L * *", "the day of the month 'l': no such day of the month"),
        ("* * * * 5#2", "no weekday, range of them or step; expected 0-7 or sun-sat"),
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
    assert parse("0 0 29 2 *") == "0 0 29 2 *"


def test_a_day_that_never_comes_leaves_the_weekday_to_decide() -> None:
    assert parse("0 0 31 2 mon") == "0 0 31 2 1"
