"""What a model family needs in every service: positions, attention, the transform of the logits.

May import nothing else of this repository; torch and transformers inside functions only.
"""
