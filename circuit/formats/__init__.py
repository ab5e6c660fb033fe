"""Foreign file formats, both ways."""
