"""An installed system's files, and how they are reached."""
