"""What other tools write and read: into a store, and out of it."""
