"""What the student can play in: an environment gives observations and rewards, the student answers.

`base` is the interface, `registry` makes one by name, `text_games` are TextArena's. Imports `common` only.
"""
