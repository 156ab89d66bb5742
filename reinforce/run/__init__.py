"""What a run does: shards are handed out to workers, and what comes back is counted."""
