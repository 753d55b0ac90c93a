"""Optional libraries with kernels of their own: which are here, which serve, and why another does not. Imports none of them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec


class Unavailable(ValueError):
    """An implementation was asked for that cannot serve here. Says why, and what would help."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Library:
    module: str
    distribution: str
    at_least: tuple[int, int]
    extra: str  # of polymux, which installs it


LIBRARIES = {"flashinfer": Library(module="flashinfer", distribution="flashinfer-python", at_least=(0, 6), extra="flashinfer")}

# Libraries of attention that are met beside ours and cannot serve: by distribution, why not.
UNSUITED = {
    "flash-attn": "its paged kernels read blocks of a multiple of 256 slots, ours have 16",
    "flash-attn-3": "no release on PyPI to hold ours to; FlashInfer brings its kernels for Hopper",
}


def why_not(name: str) -> str:
    """Why a library of LIBRARIES cannot serve here, and the fix; empty where it can."""
    library = LIBRARIES[name]
    remedy = f"pip install 'polymux[{library.extra}]'"
    if find_spec(library.module) is None:
        return f"{name} is not installed: {remedy}"
    found = installed(library.distribution)
    if found is None:
        return f"there is a module {library.module}, but no {library.distribution}: {remedy}"
    if _release(found) < library.at_least:
        return f"{name} {found} is older than {'.'.join(map(str, library.at_least))}: {remedy}"
    return ""


@cache
def installed(distribution: str) -> str | None:
    """Its version."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _release(text: str) -> tuple[int, int]:
    """Major and minor of a version; what cannot be read is old."""
    found = re.match(r"(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)
