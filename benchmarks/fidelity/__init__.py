"""How little text is enough, where the Fisher information lies, and whether it is the Hessian."""
