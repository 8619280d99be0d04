"""Experience: what a model writes down for itself after solving problems, as contexts to distil.

Pure pieces, one subject each: templates, parse, traces, accumulate, choose, stage_file. They import nothing of this
service; `learner.experience` drives them over a pool of workers.
"""
