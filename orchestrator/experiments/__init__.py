"""The experiments: one module for each question, with the options and the defaults of its study."""
