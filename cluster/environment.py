"""Every environment variable that polymux reads. Only the configuration's loader and the command line do; actors get the typed config."""

from __future__ import annotations

from collections.abc import Mapping

VARIABLES: dict[str, str] = {
    "POLYMUX_CONFIG": "path of the configuration file, where none is given on the command line",
    "POLYMUX_API_KEY": "API keys that clients must present, separated by commas; the client SDK sends the first",
    "POLYMUX_CLUSTER_TOKEN": "secret that front doors and workers of one cluster share; made at start when unset",
    "POLYMUX_BASE_URL": "address of the server for the client SDK and the command line",
    "POLYMUX_LOG_LEVEL": "DEBUG, INFO, WARNING or ERROR",
    "POLYMUX_HOST_IP": "address that workers listen on, where they must be reached from other hosts",
    "HF_HOME": "Hugging Face cache, for models named by hub id",
    "HF_TOKEN": "Hugging Face token, for gated models",
    "HF_HUB_OFFLINE": "1: never download",
    "RAY_ADDRESS": "Ray cluster to join, where none is given on the command line",
}

# Variables that stand for a field of the configuration. The environment outranks the file, a flag outranks both.
FIELDS: dict[str, str] = {
    "POLYMUX_API_KEY": "security.api_keys",
    "POLYMUX_CLUSTER_TOKEN": "security.cluster_token",
    "POLYMUX_LOG_LEVEL": "log_level",
    "POLYMUX_HOST_IP": "transport.listen_host",
}


def settings(environ: Mapping[str, str]) -> dict[str, str | list[str]]:
    """The configuration fields, by dotted path, that these variables set. Empty variables count as unset."""
    found: dict[str, str | list[str]] = {}
    for name, path in FIELDS.items():
        value = environ.get(name, "").strip()
        if value:
            found[path] = [key.strip() for key in value.split(",") if key.strip()] if name == "POLYMUX_API_KEY" else value
    return found
