"""Writes what teachers know beside the data: tar shards in, a Zarr store out."""
