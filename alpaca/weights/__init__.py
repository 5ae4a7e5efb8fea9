"""Checkpoints as files: read, compared, written in pieces, in little memory.

reader         the tensors of a folder, safetensors or .bin; what kind of folder it is
writer         shards and indexes, through a pipeline of pieces
exact_diff     a diff that gives back every bit, with digests
compression    the tensors of an exact diff, made smaller
float_diff     the diff of 2023: tuned minus base in float32
recovery       base and diff make the tuned model
merge_lora     a LoRA adapter merged into its base
gguf           a checkpoint as a GGUF file, for llama.cpp and Ollama
mismatch       why base and diff do not fit, in words
provenance     what a folder says of its making; fingerprints
"""
