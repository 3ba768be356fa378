"""How files get here, and who vouches for them."""
