"""What a run learns: one file each."""
