"""What a server's version of a file tells: its content, or no more than when it was written and how long it is.

Reference: RFC 9110, §8.8 (validators); for tags of date and size ngx_http_set_etag of nginx, ap_make_etag of Apache's
httpd 2.4 and calculateEtag of Caddy 2.
"""

from __future__ import annotations

import re

from spectra.files.storage import Stamp

_HTTP_DATE = re.compile(r"[A-Z][a-z]{2}, \d\d [A-Z][a-z]{2} \d{4} .*")
_OTHER_DATE = re.compile(r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d.*|\d{9,10}\.\d+")  # what fsspec's file systems have besides
_TIME_AND_SIZE = re.compile(r"([0-9a-f]{1,16})-([0-9a-f]{1,16})(?:-([0-9a-f]{1,16}))?(?:-[a-z]+)?")
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


def is_date(version: int | str) -> bool:
    """Whether a version is no more than the date of a change.

    >>> is_date("Fri, 01 Mar 2024 10:00:00 GMT"), is_date("2024-03-01 10:00:00+00:00"), is_date("65e1a5a0-1f4")
    (True, True, False)
    """
    return any(kind.fullmatch(str(version)) for kind in (_HTTP_DATE, _OTHER_DATE))


def tells_content(stamp: Stamp) -> bool:
    """Whether another content of the same size has another version for sure, as far as the version shows.

    >>> tells_content((500, "9b74c9897bac770ffc029102a200c5de")), tells_content((500, "65e1a5a0-1f4"))
    (True, False)
    """
    size, version = stamp
    text = str(version).lower()
    if is_date(version):
        return False
    if found := _TIME_AND_SIZE.fullmatch(text):  # nginx: date-size; Apache: [inode-]size-date
        return all(int(part, 16) != size for part in found.groups() if part)
    written = _in_36(size)  # Caddy: date and size with nothing between, the date six digits until 2038
    return not (text.endswith(written) and re.fullmatch(r"[0-9a-z]{6}|[0-9a-z]{11,13}", text.removesuffix(written)))


def _in_36(number: int) -> str:
    """In base 36.

    >>> _in_36(35), _in_36(36)
    ('z', '10')
    """
    written = _DIGITS[number % 36]
    while number := number // 36:
        written = _DIGITS[number % 36] + written
    return written
