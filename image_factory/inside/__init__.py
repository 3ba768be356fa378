"""How something is run inside a system that is made here."""
