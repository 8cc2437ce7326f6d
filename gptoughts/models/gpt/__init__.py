"""Native GPT, its attention functions and masks, and its checkpoint layouts."""
