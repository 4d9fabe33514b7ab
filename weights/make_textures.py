"""Make textures.safetensors, the photographic textures of rendered scenes, from CC0 photos.

The photos come in the package scikit-image; their licences stand in skimage/data/_fetchers.py:
python weights/make_textures.py SITE_PACKAGES/skimage/data
"""

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

TEXELS = 96
# Each with the size that the photo's shorter side is brought to, and corners (left, top) of crops.
CROPS = {
    "brick.png": (256, [(10, 10), (140, 20), (60, 150)]),  # CC0Textures, CC0
    "grass.png": (300, [(10, 10), (180, 40), (60, 190)]),  # CC0Textures, CC0
    "gravel.png": (240, [(10, 10), (130, 20), (70, 130)]),  # CC0Textures, CC0
    "chelsea.png": (240, [(40, 90), (150, 10)]),  # Stefan van der Walt, CC0
    "coffee.png": (300, [(0, 150), (340, 190), (80, 0), (150, 140)]),  # Rachel Michetti, CC0
    "camera.png": (260, [(115, 85), (0, 160), (140, 150)]),  # Lav Varshney, CC0
    "retina.jpg": (300, [(30, 60), (60, 170)]),  # Mikael Haggstrom, CC0
}

if __name__ == "__main__":
    crops = []
    for name, (shorter, corners) in CROPS.items():
        photo = Image.open(Path(sys.argv[1]) / name).convert("RGB")
        scale = shorter / min(photo.size)
        photo = photo.resize((round(photo.width * scale), round(photo.height * scale)))
        for x, y in corners:
            crops.append(np.asarray(photo.crop((x, y, x + TEXELS, y + TEXELS))))
    metadata = {"source": "sample photos of scikit-image", "licence": "CC0-1.0"}
    textures = {"textures": torch.from_numpy(np.stack(crops))}  # [20, 96, 96, 3] uint8 sRGB
    save_file(textures, Path(__file__).parent / "textures.safetensors", metadata)
