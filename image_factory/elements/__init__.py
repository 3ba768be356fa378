"""Elements: directories of scripts by phase, as diskimage-builder has them; run unmodified, with none of its code."""
