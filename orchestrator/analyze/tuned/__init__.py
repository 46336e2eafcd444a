"""Replicated tuning: in each replicate every variant is tuned and compared with the tuned baseline.

The modules call the claims of docs/comparison.md claim 2 ("Tuned LoRA matches or beats most variants.") and
claim 3 ("At one fixed learning rate the winner is an artefact of the rate.").
"""
