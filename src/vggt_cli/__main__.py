"""python -m vggt_cli"""

from vggt_cli.cli import main

if __name__ == "__main__":
    main()
