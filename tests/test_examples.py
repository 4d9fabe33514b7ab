"""The example scripts do what they say, and the photos beside them are theirs."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image


def test_the_rendered_example_is_what_its_script_makes(examples: Path, tmp_path: Path) -> None:
    script = [sys.executable, str(examples / "render.py"), str(tmp_path)]
    subprocess.run(script, check=True)
    made, kept = (
        json.loads((f / "cameras.json").read_text()) for f in (tmp_path, examples / "rendered")
    )
    for a, b in zip(made, kept, strict=True):
        np.testing.assert_allclose(a["extrinsics"], b["extrinsics"], atol=1e-4)
        np.testing.assert_allclose(a["intrinsics"], b["intrinsics"], atol=1e-2)
        assert a["intrinsics"][0][2] == a["size"][1] / 2
        photos = (
            np.asarray(Image.open(f / a["name"]), float) for f in (tmp_path, examples / "rendered")
        )
        assert np.abs(np.subtract(*photos)).mean() < 0.5  # grey levels: machines round differently
