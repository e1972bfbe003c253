"""An embedded model, its text, its task, and the quickstart made of them: a toy to see the tool work with."""
