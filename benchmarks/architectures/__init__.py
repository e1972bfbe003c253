"""On which of the model types of transformers does it work?"""
