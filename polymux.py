"""polymux: one import namespace over the folders of this repository.

In a wheel this file is `polymux/__init__.py`. In an editable install it is `.namespace/polymux/__init__.py`, beside links to
the folders. In a bare checkout it is `polymux.py`, beside the folders themselves, and says so below. A module has one name
everywhere, so what a driver pickles by reference a Ray worker can import.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polymux.deploy.client import AsyncClient, Client

__version__ = "0.1.0"
__all__ = ["AsyncClient", "Client", "__version__"]

if "__path__" not in globals():
    __path__ = [__file__.removesuffix("/polymux.py")]


def __getattr__(name: str) -> Any:
    """Import the client classes on first use, so that `import polymux` in a worker costs nothing."""
    if name in ("AsyncClient", "Client"):
        from polymux.deploy import client

        return getattr(client, name)
    raise AttributeError(f"module 'polymux' has no attribute {name!r}")
