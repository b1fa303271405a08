"""Generated tasks: items of five kinds, and the tokenizer of the models that are trained on them."""
