"""Collectives between GPUs of one machine, beside NCCL, torch's symmetric memory and torch's own copies.

`python -m benches.gpus` from the repository's root measures and prints tables, and
`python -m benches.gpus.tune` tries the communicator's thresholds out. The process that is started does no GPU
work: it asks others, which hold their tensors and graphs all the while, and takes turns between them, so that
every figure of a table comes from the same minutes.
"""
