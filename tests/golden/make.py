"""Writes networks.safetensors beside it: what the small networks give, to notice any change.

Run from the root after parity with the published numbers has been shown on the same commit:
`python tests/golden/make.py`.
"""

import sys
from dataclasses import replace
from pathlib import Path

from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))

from golden_data import OWN, SMALL_OMEGA, SMALL_VGGT, own_outputs

if __name__ == "__main__":
    fixed = own_outputs(replace(SMALL_VGGT, track_position_embedding=True))
    own = {
        "omega": own_outputs(SMALL_OMEGA),
        "vggt": own_outputs(SMALL_VGGT),
        "vggt-fixed": {"track": fixed["track"]},
    }
    save_file({f"{n}.{k}": v for n, named in own.items() for k, v in named.items()}, OWN)
    OWN.chmod(0o644)
