"""Making instruction data.

self_instruct      prompts and parsing of 2023's self-instruct
state              what a generation has so far, on disk
novelty            the ROUGE-L filter and its index, the exclusion of evaluation sets
backtranslation    instruction backtranslation: rating and curating
texts              texts to write instructions for
verb_noun          root verb and noun of an instruction
sunburst           the diversity figure
"""
