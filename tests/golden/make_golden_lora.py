"""Makes lora.npz: adapters of one layer of the official golden DiT by PEFT and LyCORIS, and rows of what they make.

pip install peft lycoris-lora && python tests/golden/make_golden_lora.py
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model

IN, OUT, ROWS = 128, 160, 8
LAYER = "blocks.1.ffn.0"
DIT = Path(__file__).parent / "official/diffusion_pytorch_model.safetensors"
PEFT = {
    "lora": LoraConfig(r=4, lora_alpha=6, target_modules=["ffn.0"]),
    "rslora": LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=["ffn.0"]),
    "dora": LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=["ffn.0"]),
    "loha": LoHaConfig(r=3, alpha=5, target_modules=["ffn.0"]),
    "lokr": LoKrConfig(r=3, alpha=5, target_modules=["ffn.0"]),
    "lokr_both": LoKrConfig(r=3, alpha=5, decompose_both=True, decompose_factor=8, target_modules=["ffn.0"]),
    "lokr_full": LoKrConfig(r=64, alpha=16, target_modules=["ffn.0"]),
}
LYCORIS = {
    "dora": (LoConModule, {"weight_decompose": True}),
    "dora_in": (LoConModule, {"weight_decompose": True, "wd_on_out": False}),
    "loha": (LohaModule, {}),
    "lokr": (LokrModule, {"factor": 8}),
    "lokr_dora": (LokrModule, {"factor": 8, "weight_decompose": True}),
    "lokr_full": (LokrModule, {"factor": 8, "full_matrix": True}),
}


class Net(torch.nn.Module):
    """A layer where the DiT has it."""

    def __init__(self, weight):
        super().__init__()
        self.blocks = torch.nn.ModuleList([torch.nn.ModuleDict(), torch.nn.ModuleDict()])
        linear = torch.nn.Linear(IN, OUT, bias=False)
        linear.weight.data = weight.clone()
        self.blocks[1]["ffn"] = torch.nn.ModuleList([linear])


def shaken(module):
    """With no parameter of an adapter at zero."""
    for name, x in module.named_parameters():
        if any(part in name for part in ("lora_", "hada_", "lokr_", "dora_", "scalar")) and "base" not in name:
            x.data = x.data + 0.2 * torch.randn_like(x) * (x.abs().mean() + 0.1)


def by_peft(config, weight):
    """The files that PEFT writes, and its merged weight."""
    model = get_peft_model(Net(weight), config)
    shaken(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tensors = safetensors.numpy.load_file(Path(folder) / "adapter_model.safetensors")
        said = json.loads((Path(folder) / "adapter_config.json").read_text())
    merged = model.merge_and_unload().blocks[1]["ffn"][0].weight.detach().numpy()
    return tensors, said, merged


def by_lycoris(cls, settings, weight):
    """The tensors that LyCORIS writes, and the weight that its forward pass multiplies by."""
    linear = torch.nn.Linear(IN, OUT, bias=False)
    linear.weight.data = weight.clone()
    module = cls(f"lycoris_{LAYER.replace('.', '_')}", linear, 1.0, 4, 6, **settings)
    shaken(module)
    module.apply_to()
    with torch.no_grad():
        merged = module(torch.eye(IN)).T.numpy()
    return {f"{module.lora_name}.{k}": x.detach().numpy() for k, x in module.custom_state_dict().items()}, merged


def main():
    """Make all of them and write."""
    torch.manual_seed(0)
    weight = torch.from_numpy(safetensors.numpy.load_file(DIT)[f"{LAYER}.weight"])
    arrays = {}
    for name, config in PEFT.items():
        tensors, said, arrays[f"peft-{name}/merged"] = by_peft(config, weight)
        arrays |= {f"peft-{name}/{k}": x for k, x in tensors.items()}
        keep = ("r", "lora_alpha", "alpha", "use_rslora", "use_dora", "peft_type", "alpha_pattern", "rank_pattern")
        arrays[f"peft-{name}/config"] = np.array(json.dumps({k: said[k] for k in keep if k in said}))
    for name, (cls, settings) in LYCORIS.items():
        tensors, arrays[f"lycoris-{name}/merged"] = by_lycoris(cls, settings, weight)
        arrays |= {f"lycoris-{name}/{k}": x for k, x in tensors.items()}
    arrays |= {key: x[:ROWS] for key, x in arrays.items() if key.endswith("/merged")}
    for key, x in arrays.items():
        print(key, x.shape)
    np.savez_compressed(Path(__file__).with_name("lora.npz"), **arrays)


if __name__ == "__main__":
    main()
