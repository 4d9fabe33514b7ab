"""The networks: photos in, encoded poses and depth out. Needs torch and nothing above."""
