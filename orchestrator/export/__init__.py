"""Export of trained lanes: as an adapter of PEFT, as a plain model of transformers, or as exact tensors."""
