"""What classical structure from motion makes of the photos alone: SIFT and incremental mapping.

The bar that refinement must reach. Features, matches and mapping are pycolmap's with its defaults,
at the photos' full size; one seed. It is given no intrinsics, but knows what EXIF says, and that
photos of one size came from one camera.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from vggt_cli.formats import colmap
from vggt_cli.formats.colmap_read import read
from vggt_cli.scene import Cameras

THREADS = 1  # with more, results differ from run to run
SEED = 0


def reconstruct(folder: Path, names: Sequence[str], image_size: torch.Tensor) -> Cameras:
    """The cameras of the photos `names` in `folder`, NaN where one could not be registered.

    image_size: [S, 2] of the photos. Of several models the one with most photos is taken.
    """
    with tempfile.TemporaryDirectory() as scratch:
        models = [read(found) for found in _mapped(folder, names, image_size, Path(scratch))]
    extrinsics = torch.full((len(names), 3, 4), torch.nan, dtype=torch.float64)
    intrinsics = torch.full((len(names), 3, 3), torch.nan, dtype=torch.float64)
    if models:
        best = max(models, key=lambda model: len(model.names))
        rows = [names.index(name) for name in best.names]
        extrinsics[rows] = best.cameras.extrinsics
        intrinsics[rows] = best.cameras.intrinsics
    return Cameras(extrinsics, intrinsics, image_size)


def _mapped(
    folder: Path, names: Sequence[str], image_size: torch.Tensor, scratch: Path
) -> list[Path]:
    """Folders of the models that pycolmap's mapper made."""
    module = colmap.pycolmap()
    database, models = scratch / "database.db", scratch / "models"
    models.mkdir()
    cpu, few = module.Device.cpu, {"num_threads": THREADS, "use_gpu": False}
    one_size = bool((image_size == image_size[0]).all())
    mode = module.CameraMode.SINGLE if one_size else module.CameraMode.AUTO
    extraction = module.FeatureExtractionOptions(few)
    module.extract_features(
        database, folder, list(names), mode, extraction_options=extraction, device=cpu
    )
    module.match_exhaustive(
        database,
        module.FeatureMatchingOptions(few),
        verification_options=module.TwoViewGeometryOptions({"ransac": {"random_seed": SEED}}),
        device=cpu,
    )
    mapping = module.IncrementalPipelineOptions({"num_threads": THREADS, "random_seed": SEED})
    module.incremental_mapping(database, folder, models, mapping)
    return sorted(path for path in models.iterdir() if path.is_dir())
