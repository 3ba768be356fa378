"""What a build tells: its record, the display, estimates, results of tests."""
