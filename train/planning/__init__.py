"""What a run will take: memory, traffic, time."""
