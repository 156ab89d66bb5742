"""What looks at a store: its numbers, its faults, and the proof that its views can be made again."""
