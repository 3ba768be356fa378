"""What a finished artifact has to pass."""
