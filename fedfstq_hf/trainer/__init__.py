"""What `FedFSTQMixin` is made of: joining, rounds inside one `train()`, and what is read off a training step.

Knows transformers and PEFT; the numbers themselves come from `sensitivity` and `codec`.
"""
