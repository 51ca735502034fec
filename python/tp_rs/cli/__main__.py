"""`python -m tp_rs.cli`, where the script is not on the PATH."""

from tp_rs.cli import main

main()
