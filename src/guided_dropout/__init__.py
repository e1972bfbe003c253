"""Dropout rates for fine-tuning language models, guided by the Fisher information of the pretrained weights."""
