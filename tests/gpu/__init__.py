"""The check-up for a GPU machine, ``python -m tests.gpu``: one line a check, with figures, limits and a verdict.

`checks/` holds the checks by subject, which run the product's code. May import the services, and helpers of
tests.support that need neither Ray nor vLLM.
"""
