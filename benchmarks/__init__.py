"""Benchmarks: each prints a table, writes JSON with `--json PATH` and has a check mode with a bound."""
