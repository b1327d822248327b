"""Thieves, a file each: what a model is asked, so that a clone can be made of its answers.

    queries(answer, pool, budget, generator, learn) -> inputs [M, C, H, W], M <= budget

Args: answer (inputs -> answers [B, K] as the victim gives them; each input is a query and counts
against the budget), pool [N, C, H, W] of images the thief has, budget in queries, generator
(torch.Generator; all chance is drawn from it), learn(inputs, answers) -> a clone taught with them.
With `NEEDS_POOL = False` only the shape of the pool and the range of its values are looked at.
"""
