"""Runs a Program on torch.distributed: ranks, transport, optimizer, data, the training loop."""
