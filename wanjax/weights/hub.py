"""TrainCheckpoints by their name on the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from wanjax.errors import InputError
from wanjax.remote import fetch, is_address

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
"""OWNER/NAME."""
LEFT_OUT = ["*.md", "*.mp4", "*.gif", "*.png", "*.jpg", "assets/*", "examples/*"]
"""Of a repository: what no network needs."""


def checkpoint_folder(name: str | Path) -> Path:
    """The folder of a checkpoint: `name` itself, or what the hub has under that id, downloaded into its cache.

    `HF_HOME`, `HF_HUB_OFFLINE`, `HF_TOKEN` and the like are the hub library's own.

    Args:
      name: a folder, the address of one in a bucket, or OWNER/NAME where there is no such folder.

    Raises:
      InputError: it is on the hub only, and the hub's library is not installed, or cannot get it.
    """
    if is_address(name):
        return fetch(name)
    if Path(name).exists() or not HUB_ID.fullmatch(str(name)):
        return Path(name)
    try:
        import huggingface_hub
    except ImportError as error:
        raise InputError(
            f"checkpoint {name} is no folder here; one of the Hugging Face hub is accepted too, with its library: "
            "pip install 'wanjax[hub]'"
        ) from error
    try:
        return Path(huggingface_hub.snapshot_download(str(name), ignore_patterns=LEFT_OUT))
    except Exception as error:  # what the library and its transports raise has no common base
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"checkpoint {name} is no folder here, and the Hugging Face hub does not give it ({reason}); a folder or "
            "OWNER/NAME of the hub is accepted; check the name and the network, or download it"
        ) from error
