"""Seconds and bytes of operators, reshards and optimizer steps on a cluster."""
