"""What a run leaves behind: its directory, and the pictures made from it."""
