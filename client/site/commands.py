"""The words of `silotune site` commands in lines of advice."""

from __future__ import annotations

from pathlib import Path

POLICY = "site.toml"
JOIN = ("--server", "HOST:PORT", "--ca", "CA", "--fingerprint", "FINGERPRINT")  # what a site needs
JOIN_NOTE = "the operator has all three"


def on_site(config: Path, verb: str, *words: object) -> tuple[object, ...]:
    """The words of a `silotune site` command on the site of `config`, for a line of advice: with
    --config, for without it the command would be about the site of the folder it is typed in."""
    return ("site", verb, *words, "--config", config)
