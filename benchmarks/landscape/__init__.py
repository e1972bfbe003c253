"""How long a point of a loss landscape takes, beside one plain evaluation forward and other ways."""
