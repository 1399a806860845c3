"""``python -m bntools.cli``."""

from . import main

main(prog_name="bntools")
