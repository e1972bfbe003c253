"""How the committed results were made; nothing in the package imports it."""
