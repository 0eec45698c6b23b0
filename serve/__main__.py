"""`python -m deltamux.serve` is the `deltamux` command."""

from deltamux.serve.cli import main

main()
