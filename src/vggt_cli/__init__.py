"""Photos in, scene out: cameras, depth and points from one feed-forward transformer.

import vggt_cli
scene = vggt_cli.reconstruct("photos/", vggt_cli.Options(model="mini"))
vggt_cli.write(scene, Path("scene"))
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Looked up when first asked for: importing the package must not load torch.
_OFFERED = {
    "reconstruct": "reconstruction.pipeline",
    "Options": "reconstruction.settings",
    "write": "formats.export",
    "Scene": "scene",
    "ImageSet": "scene",
    "Cameras": "scene",
    "Prediction": "scene",
    "PointCloud": "scene",
    "Tracks": "scene",
    "VggtError": "errors",
}
__all__ = [*sorted(_OFFERED), "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _OFFERED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_OFFERED[name]}"), name)
