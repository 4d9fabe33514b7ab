"""Size limits of the design: modules and functions stay readable. Run by `make check`."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

SRC = Path(__file__).parents[1] / "src" / "vggt_cli"
LINES = 350
LINES_OF = {"models/vggt.py": 500, "models/mini.py": 500, "models/omega.py": 500, "cli.py": 300}
FUNCTION = 60
LONG = {"forward", "train"}  # a network's figure and the training loop read top to bottom
COMMANDS = {
    "cli_reconstruct.py",
    "cli_weights.py",
    "cli_learning.py",
    "cli_check.py",
    "cli_scenes.py",
    "cli_doctor.py",
}  # a command's length is its options


def violations() -> Iterator[str]:
    """Each module or function that is over its limit, in words."""
    for path in sorted(SRC.rglob("*.py")):
        name = path.relative_to(SRC).as_posix()
        text = path.read_text(encoding="utf-8")
        if (lines := text.count("\n")) > LINES_OF.get(name, LINES):
            yield f"{name}: {lines} lines, limit {LINES_OF.get(name, LINES)}"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.name not in LONG:
                length = (node.end_lineno or 0) - node.lineno + 1
                if length > FUNCTION and name not in COMMANDS:
                    yield f"{name}: {node.name} has {length} lines, limit {FUNCTION}"


if __name__ == "__main__":
    found = list(violations())
    print("\n".join(found) or "sizes: ok")
    sys.exit(bool(found))
