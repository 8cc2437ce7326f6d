"""Parameter-efficient fine-tuning through peft, and 4-bit base weights."""
