"""`python -m coadvise`, the same as `coadvise`."""

from coadvise.cli import main

main()
