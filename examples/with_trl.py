"""Guided dropout with TRL's SFTTrainer and LoRA on a Llama-like model, which is built without residual dropout.

Usage: python with_trl.py MODEL PROFILE, after `guided-dropout fisher MODEL --text TEXT --out PROFILE`.
"""

import sys

from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from guided_dropout import DropoutSchedule, FisherProfile, GuidedDropoutCallback, add_residual_sites

name, folder = sys.argv[1:]
model = get_peft_model(AutoModelForCausalLM.from_pretrained(name), LoraConfig(task_type="CAUSAL_LM"))
add_residual_sites(model)  # after wrapping, so that what the adapter writes is dropped too
schedule = DropoutSchedule.from_profile(FisherProfile.from_pretrained(folder), model, upper=0.1, lower=0.0)

trainer = SFTTrainer(
    model=model,
    args=SFTConfig(output_dir="sft", max_steps=100),
    train_dataset=load_dataset("trl-lib/Capybara", split="train"),
)
trainer.add_callback(GuidedDropoutCallback(schedule, trainer=trainer))
trainer.train()
