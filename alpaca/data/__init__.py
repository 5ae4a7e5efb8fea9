"""From a file of rows to token ids.

rows             reading rows, from any file type
formats          layouts of files: which column is what, conversations, self-instruct's tasks
prompts          the two Alpaca prompts, templates like them, and what a row must have for them
chat_template    the same prompts as a chat template of the tokenizer
tokenizer        opening a tokenizer; its special tokens, the pad token
tokenization     where text becomes ids and labels, and the cache of them
report           what is said about the data before training
"""
