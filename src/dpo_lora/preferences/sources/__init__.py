"""Rows from files and the hub, streamed in bounded batches."""
