"""`python -m umbel`: the same as the command `umbel`."""

from umbel.cli import main

main()
