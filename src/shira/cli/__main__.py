"""python -m shira.cli, for where no `shira` is on the path."""

from . import main

main()
