"""How artifacts get elsewhere."""
