"""Disks that are laid out here, from the tree of a system."""
