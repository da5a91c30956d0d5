"""Why a server gave nothing, in the user's terms: on the way to it, or in its answer."""

from __future__ import annotations

import os
from collections.abc import Iterator
from urllib.parse import urlsplit

from spectra.errors import NotFoundError
from spectra.files.client import first_line, sends_a_token, without_links

CODES = {  # what the hub's X-Error-Code says, by the client's names
    "GatedRepo": "GatedRepoError",
    "RepoNotFound": "RepositoryNotFoundError",
    "RevisionNotFound": "RevisionNotFoundError",
}
_WITHOUT_A_TOKEN = {
    "GatedRepoError": "it is gated: accept its terms on the hub, then `hf auth login`",
    "RepositoryNotFoundError": "the hub has no such model, or it is private: `hf auth login`",
    "RevisionNotFoundError": "the hub has the model, but not this revision",
}
_WITH_A_TOKEN = _WITHOUT_A_TOKEN | {
    "GatedRepoError": "it is gated, and the token that was sent has no access: accept its terms on the hub, or wait "
    "until its authors let you in (a fine-grained token needs the permission for gated models)",
    "RepositoryNotFoundError": "the hub has no such model, or it is private and the token that was sent may not see it",
}
_FINAL = {  # what no other attempt mends, by the class of the error
    "SSLCertVerificationError": "its certificate is not trusted ({}): where the network or the server has its own, "
    "name their file in $SSL_CERT_FILE",
}
_SAID = _FINAL | {
    "gaierror": "the name has no address ({})",
    "UnicodeEncodeError": "the token holds signs that cannot be sent: `hf auth login` again, or mend $HF_TOKEN",
}
NO_TLS = "the server speaks no encryption there: should https:// be http://?"


class GatedError(NotFoundError):
    """The model is there, and the hub lets nobody read it who has not asked."""


def of_the_hub(name: str) -> str:
    """What the client's error of this name means; "" for one that is not among those.

    Args:
        name: the class of the error.
    """
    if name not in _WITHOUT_A_TOKEN:
        return ""
    return (_WITH_A_TOKEN if sends_a_token() else _WITHOUT_A_TOKEN)[name]


def of_a_token() -> str:
    """What a 401 of the hub means that names no model."""
    if sends_a_token():
        return "the hub refuses the token that was sent (401): `hf auth login` again, or mend $HF_TOKEN"
    return "the hub refuses it (401): `hf auth login`"


def on_the_way(problem: BaseException, seconds: float) -> str:
    """What went wrong before an answer came, in one line.

    Args:
        seconds: for how long an answer was waited for.
    """
    if "Timeout" in type(problem).__name__:
        return f"no answer within {seconds:g} s"
    for cause in _causes(problem):
        if "WRONG_VERSION_NUMBER" in str(cause):
            return NO_TLS
        for cls in type(cause).__mro__:
            if cls.__name__ in _SAID:
                return _SAID[cls.__name__].format(
                    getattr(cause, "verify_message", "") or getattr(cause, "strerror", "")
                )
    return without_links(first_line(problem))


def is_final(problem: BaseException) -> bool:
    """Whether another attempt would end in the same."""
    causes = list(_causes(problem))
    return any(cls.__name__ in _FINAL for cause in causes for cls in type(cause).__mro__) or any(
        "WRONG_VERSION_NUMBER" in str(cause) for cause in causes
    )


def by_proxy(url: str) -> str:
    """Which of the user's proxies a request goes through, to say in a message; "" for none."""
    parts = urlsplit(url)
    names = (f"{parts.scheme}_proxy", "all_proxy")
    given = [name for lower in names for name in (lower, lower.upper()) if os.environ.get(name)]
    if not given:
        return ""
    from urllib.request import proxy_bypass  # brings ssl and a client along, for which no listing waits

    return "" if proxy_bypass(parts.netloc) else f" by way of the proxy in ${given[0]}"


def _causes(problem: BaseException | None) -> Iterator[BaseException]:
    while problem is not None:
        yield problem
        problem = problem.__cause__ or problem.__context__
