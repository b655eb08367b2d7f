"""The spellings of what a LoRA file holds of a layer, made one."""

from __future__ import annotations

import re

from wanjax.weights import lycoris

PREFIX = re.compile(r"((base_model\.)?model\.)?(diffusion_model\.|transformer\.|pipe\.dit\.)?")
PART = re.compile(
    r"(?P<layer>.+?)\.(?:(?P<factor>lora_A|lora_down|lora_B|lora_up)(?:\.(?!weight$|bias$)\w+)?\.(?P<of>weight|bias)"
    rf"|(?P<other>alpha|diff|diff_b|diff_m|dora_scale|{'|'.join(lycoris.NAMES)}))"
)
PARTS = {
    **dict.fromkeys([("lora_A", "weight"), ("lora_down", "weight")], "a"),
    **dict.fromkeys([("lora_B", "weight"), ("lora_up", "weight")], "b"),
    **dict.fromkeys([("lora_B", "bias"), ("lora_up", "bias")], "b_bias"),
}
OLD_FACTOR = re.compile(r"(?:\.lora|_lora|\.lora_linear_layer)\.(up|down)(?=\.weight$|$)")
OTHER_NAMES = re.compile(r"\.(lora_magnitude_vector(?:\.(?:default\.)?weight)?|w_norm|b_norm)$")
USUAL = {"w_norm": "diff", "b_norm": "diff_b"}
BARE_FACTOR = re.compile(r"(\.lora_(?:A|B|up|down))$")


def usual_name(key: str) -> str:
    """The name with the parts that most files have: `.lora_down.weight` for `_lora.down`, and so on."""
    key = key.replace(".processor.", ".")
    key = OLD_FACTOR.sub(r".lora_\1", key)
    key = OTHER_NAMES.sub(lambda found: f".{USUAL.get(found[1], 'dora_scale')}", key)
    return BARE_FACTOR.sub(r"\1.weight", key).replace("lycoris_", "lora_unet_", 1)
