"""Whom rounding treats otherwise: discriminatory inputs, group metrics, churn; float and quantized.

domain     the valid tokens of each position; `Attribute`, the one that must not matter
answer     a classifier asked about rows of tokens, or about all of them at once
groups     SPD, DI, AOD, EOD and accuracy, of counts
decoder    latents to rows: a small VAE
probe/     where discriminatory inputs are looked for, a file each
rows       a table as sentences of tokens; classifier, one that reads them; census, one to try
text       sentences and their counterparts
retrain    the same classifier taught with what was found
compare    qtk.fairness

A probe is a file in `qtk/fair/probe` with

    draw(answer, rows, domain, protected, n, generator) -> rows

Args: answer (Answer), rows [N, T] int64 of the data, domain (Domain), protected (Attribute), n rows
wanted, generator (torch.Generator; all chance is drawn from it). It answers valid rows [M, T], no
two alike in all but the protected position. With `NEEDS_DECODER = True` it is given `decoder=` too.
"""
