"""Text and tokens, and nothing of a process: a model's tokenizer and chat template, and the redaction of prompts.

tokenizer.py is what others use; tokenizer_files.py, gguf_tokenizer.py and chat_template.py read what a model's folder
says, token_sizes.py bounds what a text can become, redaction.py blanks what an operator names.
"""
