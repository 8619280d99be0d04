"""The computation of one rank: DeepSpeed engine, policy, output layer, losses, micro-batches, LoRA, export, state.

Imports torch and `common`, no other room. The driver imports `distributed`, `reports` and `token_records`: no torch.
"""
