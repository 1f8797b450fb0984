from __future__ import annotations

import pytest

from manager.domain.cron_words import cron_words


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("* * * * *", "every minute"),
        ("*/15 * * * *", "every 15 minutes"),
        ("*/7 * * * *", "at minutes 0, 7, 14, 21, 28, 35, 42, 49 and 56 of every hour"),
        ("5 * * * *", "at minute 5 of every hour"),
        ("5,10 * * * *", "at minutes 5 and 10 of every hour"),
        ("0-20 * * * *", "at minutes 0 to 20 of every hour"),
        ("@hourly", "every hour"),
        ("@daily", "at 00:00, every day"),
        ("0 8,12 * * *", "at 08:00 and 12:00, every day"),
        ("0 8 * * mon-fri", "at 08:00, Monday to Friday"),
        ("0 8 * * 6,7", "at 08:00, Sunday and Saturday"),
        ("*/5 8-18 * * 1-5", "every 5 minutes, in the hours 8 to 18, Monday to Friday"),
        ("7 */2 * * *", "at minute 7, every 2 hours, every day"),
        ("0 9-23/2 * * *", "at minute 0, in the hours 9, 11, 13, 15, 17, 19, 21 and 23, every day"),
        ("30 22 1,15 * *", "at 22:30, on days 1 and 15 of the month"),
        ("0 0 1 jan,mar *", "at 00:00, on day 1 of the month, in January and March"),
        ("0 0 * 6-8 *", "at 00:00, every day, in June to August"),
        ("0 0 13 * 5", "at 00:00, on day 13 of the month and every Friday"),
        ("0 0 */10 * 5", "at 00:00, on days 1, 11, 21 and 31 of the month if it is a Friday"),
        ("0 0 1-7 * */3", "at 00:00, on days 1 to 7 of the month if it is a Sunday, Wednesday or Saturday"),
    ],
)
def test_a_line_is_told_in_words(line: str, words: str) -> None:
    assert cron_words(line) == words


def test_what_is_no_line_is_refused() -> None:
    with pytest.raises(ValueError, match="fields instead of 5"):
        cron_words("every day")
