"""The pipeline of `opcd experience`: extract → accumulate → select → consolidate; `commands` runs the stages.

It may import every other room of the learner; none of them imports it.
"""
