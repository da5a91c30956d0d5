"""An update as a LoRA: which ranks, which factors, and the files that PEFT and image tools load."""
