"""Dropout rates for fine-tuning language models, guided by the Fisher information of the pretrained weights."""

from guided_dropout.fisher import FisherProfile, estimate_fisher

__all__ = ["FisherProfile", "estimate_fisher"]
