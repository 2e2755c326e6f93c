"""python -m shira.cli, for environments without `shira` on the path."""

from . import main

main()
