"""What a method needs in memory, before anything is downloaded."""
