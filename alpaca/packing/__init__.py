"""The rows of an optimizer step without padding, with the gradient of padded ones.

packing      rows laid end to end, shared prefixes once
sampler      which rows a rank trains on in which step
attention    attention confined to the rows of a pack
loss         cross entropy of the targets alone
check        packed against padded, before a run relies on it
"""
