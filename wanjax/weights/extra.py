"""What a layout has no place for, kept beside a converted checkpoint in `wanjax_extra/`, which other libraries ignore.

extra.json            numbers and names (see `Extra`)
{network}.safetensors tensors, with the names of the layout that they came from
files/                whole files of that layout, at their places
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from wanjax.errors import InputError
from wanjax.settings import Config, SettingError, setting
from wanjax.weights.layouts import Settings
from wanjax.weights.mapping import LayoutName

FOLDER = "wanjax_extra"
MOST_SHIFT = 1000
ABOUT = (
    "Written by `wanjax convert`: what the layout of this checkpoint has no place for. Used when the "
    "checkpoint is loaded by wanjax or converted back; other libraries ignore it."
)


@dataclasses.dataclass
class Extra(Config):
    """The contents of `extra.json`.

    Attributes:
      origin: the layout that the checkpoint was converted from, never the one that it has.
      numbers: per network, entries of its configuration that differ from what its own files say.
      flow_shift: the schedule's shift, where the layout cannot say it.
      boundary: of two experts, where the layout cannot say it.
      assumed_flow_shift: the shift that was written into the schedule although the origin did not say one.
      names: per network, tensors of the origin with another name than is usual there, by the usual name.
      copies: per network, tensors of the origin that were bit for bit the same as another, and the other's name.
    """

    origin: LayoutName
    numbers: dict[str, dict[str, object]] = dataclasses.field(default_factory=dict)
    flow_shift: float | None = setting(None, above=0, most=MOST_SHIFT)
    boundary: float | None = setting(None, least=0, most=1)
    assumed_flow_shift: float | None = setting(None, above=0, most=MOST_SHIFT)
    names: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)
    copies: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)

    @classmethod
    def read(cls, checkpoint: Path) -> Extra | None:
        """What lies beside the checkpoint, if anything.

        Raises:
          InputError: `extra.json` is damaged.
        """
        path = checkpoint / FOLDER / "extra.json"
        if not path.parent.is_dir():
            return None
        settings = Settings(path)
        settings.pop("about", None)
        try:
            return cls(**settings)
        except (TypeError, SettingError) as error:
            why = getattr(error, "detail", error)
            raise InputError(f"{path} is damaged ({why}); convert the checkpoint again.") from error

    def write(self, checkpoint: Path) -> None:
        """Writes `extra.json`."""
        path = checkpoint / FOLDER / "extra.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"about": ABOUT, **dataclasses.asdict(self)}, indent=2) + "\n", encoding="utf-8")
