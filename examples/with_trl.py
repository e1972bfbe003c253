"""Guided dropout with TRL's SFTTrainer and LoRA on a Llama-like model, which is built without residual dropout.

Usage: python with_trl.py MODEL PROFILE DATA, after `guided-dropout fisher MODEL --text TEXT --out PROFILE`. DATA is a
data set that SFTTrainer takes: a folder, or a name on the hub such as trl-lib/Capybara.

This is for SFT. DPO and KTO of an adapter would drop in the reference model too: give them
`precompute_ref_log_probs=True` or a `ref_model`. GRPO and RLOO draw and score completions with dropout on.
"""

import sys

import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from guided_dropout import DropoutSchedule, FisherProfile, GuidedDropoutCallback, add_residual_sites

name, folder, data = sys.argv[1:]
model = get_peft_model(AutoModelForCausalLM.from_pretrained(name), LoraConfig(task_type="CAUSAL_LM"))
add_residual_sites(model)  # after wrapping (so no peft_config= below): what the adapter writes is dropped too
schedule = DropoutSchedule.from_profile(FisherProfile.from_pretrained(folder), model, upper=0.1, lower=0.0)

trainer = SFTTrainer(
    model=model,
    args=SFTConfig(output_dir="sft", max_steps=100, bf16=torch.cuda.is_available()),  # TRL asks for it otherwise
    train_dataset=load_dataset(data, split="train"),
)
trainer.add_callback(GuidedDropoutCallback(schedule, trainer=trainer))
trainer.train()
