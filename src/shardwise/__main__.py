"""`python -m shardwise`, which torchrun's `-m shardwise` also runs."""

from shardwise.cli import main

main()
