"""What a model family needs in every service: positions, attention, the transform of the logits.

May import error_text; torch and transformers inside functions only.
"""
