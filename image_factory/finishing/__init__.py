"""What is done to an installed disk before and after it is converted."""
