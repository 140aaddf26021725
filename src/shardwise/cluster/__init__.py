"""What a plan runs on: ranks, their memory, and how fast they compute and communicate."""
