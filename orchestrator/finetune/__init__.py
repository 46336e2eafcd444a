"""Fine-tuning in one process: lanes in, reports and records out. Imports no Ray."""

import os

# The rounding of oneDNN's AMX kernels depends on the number of matrices in a batch, so that the results of a
# bfloat16 lane on a CPU would depend on other lanes. oneDNN reads the variable at its first product. A value
# that the user has set is kept.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")
