"""The format: one Zarr group per shard, one array per column, and the manifest."""
