"""What is known of machines: architectures, consoles, how many run at once."""
