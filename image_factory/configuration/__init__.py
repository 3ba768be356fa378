"""What the user wants: settings, and the files that have them."""
